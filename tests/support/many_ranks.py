"""A reader and a source of several ranks each: a memory for every rank, in one process or over NIXL.

Who holds what is worked out here in a way of its own, head by head, so that nothing is held against itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kv_transfer.config import TransportConfig
from kv_transfer.layout import Group, KvLayout
from kv_transfer.nixl_transport import NixlTransport
from kv_transfer.rank_link import LinkedRank
from kv_transfer.ranked import RankedTransport, pack_endpoints
from kv_transfer.transport_inprocess import InProcessNetwork, InProcessTransport
from tests.support.kv_pool import Pool, Shape, SourceProcess
from tests.support.rank_process import RankProcess
from tests.support.wired import READER, SOURCE, Wired


def held_by(group: Group, degree: int, rank: int) -> list[int]:
    """The heads of a rank: dealt out in order, as evenly as can be; with fewer heads than ranks, a head to each."""
    if group.rule.values or group.rule.state:
        return [0]
    count = group.kv_heads
    if count < degree:
        return [rank * count // degree]
    first_of = [owner * count // degree for owner in range(degree)]
    return [head for head in range(count) if max(r for r in range(degree) if first_of[r] <= head) == rank]


def held_by_rank(layout: KvLayout, degree: int, rank: int) -> list[list[int]]:
    return [held_by(group, degree, rank) for group in layout.groups]


def part(layout: KvLayout, number: int, heads: Sequence[int], block: np.ndarray) -> np.ndarray:
    """Of a whole block's bytes those of some heads."""
    group = layout.groups[number]
    if group.rule.state:
        return block
    return block.reshape(len(group.layers) * group.planes, group.kv_heads, -1)[:, heads].reshape(-1)


def areas_of(layout: KvLayout, areas: Sequence[Shape], degree: int, rank: int) -> list[Shape]:
    """The same blocks, of this rank's heads."""
    held = held_by_rank(layout, degree, rank)
    sizes = (
        size if group.rule.state else size // group.kv_heads * len(heads)
        for group, heads, (_, size) in zip(layout.groups, held, areas, strict=True)
    )
    return [(count, size) for (count, _), size in zip(areas, sizes, strict=True)]


class ManyRanks(Wired):
    def __init__(self, layout: KvLayout, degrees: tuple[int, int], reader_areas: Sequence[Shape], poison: int) -> None:
        self.layout = layout
        self.source_degree, self.reader_degree = degrees
        super().__init__(areas_of(layout, reader_areas, self.reader_degree, 0), poison)
        others = range(1, self.reader_degree)
        self.pools = [self.pool, *(Pool(areas_of(layout, reader_areas, len(others) + 1, r), poison) for r in others)]
        self.transport = RankedTransport(READER, layout, self.reader_degree, self.events.append)

    @property
    def memories(self) -> list[Pool]:
        return self.pools

    @property
    def held(self) -> list[Sequence[Sequence[int]] | None]:
        return [held_by_rank(self.layout, self.reader_degree, rank) for rank in range(self.reader_degree)]

    def _number(self, pool: Pool, block: int) -> int:
        return pool.memory().area_of(block)

    def keep(self, block: int, content: np.ndarray) -> None:
        number = self._number(self.pool, block)
        for rank, pool in enumerate(self.pools):
            heads = held_by(self.layout.groups[number], self.reader_degree, rank)
            pool.blocks[block][:] = part(self.layout, number, heads, content)


class RanksInProcess(ManyRanks):
    def __init__(
        self,
        layout: KvLayout,
        degrees: tuple[int, int],
        source_areas: Sequence[Shape],
        reader_areas: Sequence[Shape],
        poison: int,
        make: type[InProcessTransport] = InProcessTransport,
    ) -> None:
        super().__init__(layout, degrees, reader_areas, poison)
        self.network = InProcessNetwork(blocks_per_step=2)
        self.source_pools: list[Pool] = []
        self.sources: list[InProcessTransport] = []
        for rank in range(self.source_degree):
            pool = Pool(areas_of(layout, source_areas, self.source_degree, rank))
            source = InProcessTransport(replace(SOURCE, rank=rank), self.network, lambda event: None)
            source.register(pool.memory())
            self.source_pools.append(pool)
            self.sources.append(source)
        ranks: list[Any] = []
        for rank, pool in enumerate(self.pools):
            hear = functools.partial(self.transport.hear, rank)
            one = make(replace(READER, rank=rank), self.network, hear)
            if rank:
                one.register(pool.memory())
            ranks.append(one)
        self.transport.attach(ranks, self.pool.memory())
        self.transport.connect(SOURCE, pack_endpoints([source.endpoint() for source in self.sources]))
        self.now = 0.0

    def step(self) -> None:
        self.now += 0.01
        self.network.step(self.now)

    def write(self, block: int, content: np.ndarray) -> None:
        number = self._number(self.source_pools[0], block)
        for rank, pool in enumerate(self.source_pools):
            heads = held_by(self.layout.groups[number], self.source_degree, rank)
            pool.blocks[block][:] = part(self.layout, number, heads, content)

    def set_generation(self, block: int, value: int) -> None:
        """The leader's: the others have none."""
        self.source_pools[0].generations[block] = value

    def close(self) -> None:
        self.transport.close(1.0)
        for source in self.sources:
            source.close(1.0)


class RanksOverNixl(ManyRanks):
    """Every rank of the source is a process; so is every rank of the reader but its leader."""

    def __init__(
        self,
        mode: str,
        layout: KvLayout,
        degrees: tuple[int, int],
        source_areas: Sequence[Shape],
        reader_areas: Sequence[Shape],
        poison: int,
    ) -> None:
        super().__init__(layout, degrees, reader_areas, poison)
        options: dict[str, Any] = {"pull_mode": mode, "ucx_net_devices": "lo"}
        config = TransportConfig(**options)
        of_sources = [areas_of(layout, source_areas, self.source_degree, r) for r in range(self.source_degree)]
        self._index = Pool(of_sources[0]).memory()
        self.sources = [SourceProcess(areas, options, rank=rank) for rank, areas in enumerate(of_sources)]
        others = range(1, self.reader_degree)
        self.others = [RankProcess(areas_of(layout, reader_areas, self.reader_degree, r), poison) for r in others]
        self.pools = [self.pool, *(other.pool for other in self.others)]
        hear = self.transport.hear
        ranks: list[Any] = [NixlTransport(READER, config, functools.partial(hear, 0))]
        for rank, other in enumerate(self.others, 1):
            linked = LinkedRank(other.link, replace(READER, rank=rank), functools.partial(hear, rank))
            linked.open(config)
            ranks.append(linked)
        self.transport.attach(ranks, self.pool.memory())
        for rank, one in enumerate(ranks):
            of_reader = areas_of(layout, reader_areas, self.reader_degree, rank)
            for source, of_source in zip(self.sources, of_sources, strict=True):
                source.command(
                    do="connect",
                    worker=READER.worker_id,
                    epoch=READER.epoch,
                    rank=rank,
                    endpoint=one.endpoint().hex(),
                    parts=[[own, their] for (_, own), (_, their) in zip(of_source, of_reader, strict=True)],
                )
        self.transport.connect(SOURCE, pack_endpoints([source.endpoint for source in self.sources]))

    def write(self, block: int, content: np.ndarray) -> None:
        number = self._index.area_of(block)
        for rank, source in enumerate(self.sources):
            heads = held_by(self.layout.groups[number], self.source_degree, rank)
            piece = part(self.layout, number, heads, content)
            source.command(do="write", block=block, bytes=piece.tobytes().hex())

    def set_generation(self, block: int, value: int) -> None:
        self.sources[0].command(do="generation", block=block, value=value)

    def close(self) -> None:
        self.transport.close(5.0)
        for process in (*self.sources, *self.others):
            process.close()
