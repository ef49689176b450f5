"""How the KV memory is shared out over the groups of a layout.

A group that keeps everything takes blocks in proportion to the tokens of all sequences. One with a window needs, for
each sequence, no more than its window and the chunk that is being computed, and a state two slots: so these get what
`max_running_sequences` can use at most, the rest goes to the first group, and no group gets more blocks than the first.
States are large, a slot may be as large as a thousand blocks: they take half of the memory at most, whatever number of
slots that is, and fewer sequences run at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.config import EngineConfig
from engine.kv_shape import KvShape
from engine.model_errors import ModelLoadError
from kv_transfer.layout import Group

_CPU_POOL_BYTES = 1 << 30
_SLOTS_A_SEQUENCE = 2  # a step reads one state and writes another
_SPARE_SLOTS = 2  # snapshots, at least
_COUNTING_BYTES = 16  # a token's, in a group that nobody reads: its blocks only count
_MOST_COUNTING = 1 << 17


class PoolSizes:
    def __init__(self, shape: KvShape, sequences: int, batch_tokens: int, beside: Sequence[int] = ()) -> None:
        """`beside`: by group, bytes that each of its blocks takes elsewhere, for a draft model."""
        self._shape = shape
        self._beside = beside or [0] * len(shape.groups)
        self._sequences = sequences
        self._batch_tokens = batch_tokens

    def of(self, blocks: int, slots: int | None = None) -> tuple[int, ...]:
        """By group, where the first has `blocks`, and states `slots` at most; None: as many as blocks."""
        most = blocks if slots is None else slots
        return tuple(
            blocks if not number else self._slots(most) if group.rule.state else self._of(group, blocks)
            for number, group in enumerate(self._shape.groups)
        )

    def _slots(self, most: int) -> int:
        wanted = self._sequences * _SLOTS_A_SEQUENCE + _SPARE_SLOTS
        return max(_SLOTS_A_SEQUENCE + _SPARE_SLOTS, min(wanted, most))

    def _of(self, group: Group, blocks: int) -> int:
        if not group.rule.leaves:
            return blocks
        size = self._shape.block_tokens
        reach = -(-group.rule.reach // size) + 1
        return min(blocks, self._sequences * reach + 2 * -(-self._batch_tokens // size))

    def block_bytes(self, blocks: int, slots: int | None = None) -> int:
        """Of `blocks` of the first group, and what the others have beside them."""
        counts = self.of(blocks, slots)
        size = self._shape.block_tokens
        each = zip(self._shape.groups, counts, self._beside, strict=True)
        return sum((g.block_bytes(size) + beside) * n for g, n, beside in each)

    def within(self, num_bytes: int) -> tuple[int, ...] | None:
        """The most that fits; None: nothing does."""
        first, size = self._shape.groups[0], self._shape.block_tokens
        state = next((group for group in self._shape.groups if group.rule.state), None)
        slots = None if state is None else num_bytes // 2 // state.width
        low, high = 0, max(1, num_bytes // max(1, first.block_bytes(size)))
        if first.token_bytes <= _COUNTING_BYTES:
            high = min(high, _MOST_COUNTING)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.block_bytes(middle, slots) <= num_bytes else (low, middle - 1)
        return self.of(low, slots) if low else None


def blocks_by_group(
    config: EngineConfig, shape: KvShape, device: torch.device, beside: Sequence[int] = ()
) -> tuple[int, ...]:
    """How many blocks each group gets of the memory there is, with what each takes `beside`. Raises ModelLoadError
    where it holds none.
    """
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
    else:
        free_bytes = _CPU_POOL_BYTES
    sizes = PoolSizes(shape, config.max_running_sequences, config.max_batch_tokens, beside)
    if config.num_blocks is not None:
        return sizes.of(config.num_blocks)
    blocks = sizes.within(int(free_bytes * config.kv_memory_fraction))
    if blocks is None:
        raise ModelLoadError(
            f"{free_bytes} free bytes hold no KV block of {sizes.block_bytes(1)} bytes; free memory, or set "
            "engine.num_blocks"
        )
    return blocks
