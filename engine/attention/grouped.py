"""Attention where layers differ in what they keep: each group has its pool, its block tables and its own backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from engine.attention.interface import PLAIN, AttentionBackend, Chunk, Extras, StepBatch
from kv_transfer.layout import Group


class GroupedBackend:
    """`backends` has one for each group, in the layout's order; None for what nobody attends to."""

    def __init__(self, groups: Sequence[Group], backends: Sequence[AttentionBackend | None]) -> None:
        self._groups = groups
        self._backends = backends
        self._place = {
            layer: (number, index)
            for number, group in enumerate(groups)
            for index, layer in enumerate(group.layers)
            if not group.rule.state
        }
        self.name = " and ".join(dict.fromkeys(b.name for b in backends if b is not None)) or "no attention"

    def prepare(self, kv: tuple[torch.Tensor, ...], chunks: list[Chunk]) -> GroupedBatch:
        batches: list[StepBatch | None] = []
        for number, (group, backend, pool) in enumerate(zip(self._groups, self._backends, kv, strict=True)):
            if backend is None:
                batches.append(None)
                continue
            own = chunks if number == 0 else [replace(c, block_ids=c.others[number - 1]) for c in chunks]
            batches.append(backend.prepare(pool, own, group.rule))
        return GroupedBatch(batches, self._place)


class GroupedBatch:
    """A StepBatch of several. `layer` is the model's own number."""

    def __init__(self, batches: Sequence[StepBatch | None], place: dict[int, tuple[int, int]]) -> None:
        self._batches = batches
        self._place = place

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        extras: Extras = PLAIN,
    ) -> torch.Tensor:
        number, index = self._place[layer]
        batch = self._batches[number]
        assert batch is not None
        return batch.attend(index, query, key, value, scaling, extras)
