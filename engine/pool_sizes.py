"""How the KV memory is shared out over the groups of a layout.

A group that keeps everything takes blocks in proportion to the tokens of all sequences. One with a window needs, for
each sequence, no more than its window and the chunk that is being computed, and a state two slots: so these get what
`max_running_sequences` can use at most, the rest goes to the first group, and no group gets more blocks than the first.
"""

from __future__ import annotations

from engine.kv_shape import KvShape
from kv_transfer.layout import Group

_SLOTS_A_SEQUENCE = 2  # a step reads one state and writes another
_SPARE_SLOTS = 2  # snapshots, at least


class PoolSizes:
    def __init__(self, shape: KvShape, sequences: int, batch_tokens: int) -> None:
        self._shape = shape
        self._sequences = sequences
        self._batch_tokens = batch_tokens

    def of(self, blocks: int) -> tuple[int, ...]:
        """By group, where the first has `blocks`."""
        return tuple(self._of(group, blocks) if number else blocks for number, group in enumerate(self._shape.groups))

    def _of(self, group: Group, blocks: int) -> int:
        if group.rule.state:
            return max(
                _SLOTS_A_SEQUENCE + _SPARE_SLOTS, min(self._sequences * _SLOTS_A_SEQUENCE + _SPARE_SLOTS, blocks)
            )
        if not group.rule.leaves:
            return blocks
        size = self._shape.block_tokens
        reach = -(-(group.rule.window or group.rule.chunk) // size) + 1
        return min(blocks, self._sequences * reach + 2 * -(-self._batch_tokens // size))

    def block_bytes(self, blocks: int) -> int:
        """Of `blocks` of the first group, and what the others have beside them."""
        counts = self.of(blocks)
        size = self._shape.block_tokens
        return sum(g.block_bytes(size) * n for g, n in zip(self._shape.groups, counts, strict=True))

    def within(self, num_bytes: int) -> tuple[int, ...] | None:
        """The most that fits; None: nothing does."""
        low, high = 0, max(1, num_bytes // max(1, self._shape.groups[0].block_bytes(self._shape.block_tokens)))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.block_bytes(middle) <= num_bytes else (low, middle - 1)
        return self.of(low) if low else None
