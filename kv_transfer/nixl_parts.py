"""Parts of blocks over NIXL, where two memories hold different parts of the model (kv_transfer/shards.py).

Each run of bytes of each block is a descriptor of its own, prepared once per peer; a block is then a row of indices::

    area 0: blocks of 2 runs    0 1 | 2 3 | 4 5 | ...        area 1: blocks of 1 run    2n | 2n + 1 | ...

The two ends have as many runs per block, so a pair of blocks is a pair of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kv_transfer.nixl_agent import NixlAgent, Runs
from kv_transfer.transport import AreaIndex, KvArea

MAX_DESCRIPTORS = 1 << 24


class _Rows:
    def __init__(self, index: AreaIndex, areas: Sequence[KvArea], runs: Runs) -> None:
        self._index = index
        self._runs = [len(of_area) for of_area in runs]
        counts = np.array([area.num_blocks for area in areas])
        self._first_block = np.cumsum(counts) - counts
        descriptors = counts * self._runs
        self._first_descriptor = np.cumsum(descriptors) - descriptors
        self.total = int(descriptors.sum())

    def of(self, block_ids: Sequence[int]) -> np.ndarray:
        rows = [
            self._first_descriptor[area] + (block - self._first_block[area]) * self._runs[area]
            for area, block in zip(self._index.areas_of(block_ids), block_ids, strict=True)
        ]
        counts = [self._runs[area] for area in self._index.areas_of(block_ids)]
        if len(set(counts)) == 1:
            return (np.asarray(rows)[:, None] + np.arange(counts[0])).reshape(-1)
        return np.concatenate([row + np.arange(count) for row, count in zip(rows, counts, strict=True)])


class PartLists:
    """Of one peer: `own` and `their` are NIXL's prepared lists."""

    def __init__(
        self,
        agent: NixlAgent,
        peer: tuple[str, str, int],  # the agent's name, the kind of its memory, its device
        areas: Sequence[KvArea],
        index: AreaIndex,
        own_runs: Runs,
        their_runs: Runs,
    ) -> None:
        self._own_rows = _Rows(agent.memory.index, agent.memory.areas, own_runs)
        self._their_rows = _Rows(index, areas, their_runs)
        most = max(self._own_rows.total, self._their_rows.total)
        if most > MAX_DESCRIPTORS:
            raise ValueError(f"parts of blocks take {most} descriptors, the limit is {MAX_DESCRIPTORS}: fewer blocks")
        self.own = agent.prepare("", agent.kind, agent.memory.areas, agent.device, own_runs)
        self.their = agent.prepare(*peer[:2], areas, peer[2], their_runs)

    def post(self, agent: NixlAgent, operation: str, own_ids: Sequence[int], their_ids: Sequence[int]) -> Any:
        return agent.post(operation, self.own, self._own_rows.of(own_ids), self.their, self._their_rows.of(their_ids))
