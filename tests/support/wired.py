"""A reader and a source, connected: in one process, or over NIXL."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.nixl_endpoint import NixlEndpoint
from kv_transfer.nixl_transport import NixlTransport
from kv_transfer.transport import PullFinal, PullOrder, PullOutcome, TransportEvent
from kv_transfer.transport_inprocess import InProcessNetwork, InProcessTransport, block_digest
from tests.support.kv_pool import Pool, Shape, SourceProcess

SOURCE, READER = PeerId("source", 1), PeerId("reader", 1)
POISON = 0xEE  # in every byte of the reader's memory


class Wired:
    """A reader and a source, connected."""

    transport: Any

    def __init__(self, reader_areas: Sequence[Shape], poison: int) -> None:
        self.pool = Pool(reader_areas, poison)
        self.events: list[TransportEvent] = []
        self.numbers = itertools.count(1)

    def order(self, remote: list[int], local: list[int], generation: int = 0, **options: Any) -> int:
        number = next(self.numbers)
        self.transport.submit(
            PullOrder(
                pull_id=number,
                source=options.get("source", SOURCE),
                remote_blocks=tuple(remote),
                local_blocks=tuple(local),
                generations=tuple(options.get("generations", [generation] * len(remote))),
                digests=tuple(options.get("digests", ())),
                timeout_s=options.get("timeout_s", 5.0),
            )
        )
        return number

    def outcome(self, number: int) -> PullOutcome:
        return self.wait(
            lambda: next((e for e in self.events if e.pull_id == number and isinstance(e, PullOutcome)), None)
        )

    def final(self, number: int) -> PullFinal:
        return self.wait(
            lambda: next((e for e in self.events if e.pull_id == number and isinstance(e, PullFinal)), None)
        )

    def wait(self, look: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 15.0
        while (found := look()) is None:
            assert time.monotonic() < deadline, f"nothing came: {self.events}"
            self.step()
        return found

    def step(self) -> None:
        time.sleep(0.001)

    def holds(self, expected: dict[int, int]) -> None:
        """The blocks named are full of their values, all others are as they were, and so is what lies between."""
        for block, content in enumerate(self.pool.blocks):
            assert (content == expected.get(block, self.pool.poison)).all(), block
        self.pool.check()

    @property
    def memories(self) -> list[Pool]:
        """Of the reader, by rank."""
        return [self.pool]

    @property
    def held(self) -> list[Sequence[Sequence[int]] | None]:
        """By memory and group, the heads that it has; None: all."""
        return [None]

    def check(self) -> None:
        for memory in self.memories:
            memory.check()

    def keep(self, block: int, content: np.ndarray) -> None:
        """What the reader has already."""
        self.pool.blocks[block][:] = content

    def fill(self, block: int, value: int) -> None: ...

    def write(self, block: int, content: np.ndarray) -> None: ...

    def set_generation(self, block: int, value: int) -> None: ...

    def digest(self, block: int) -> int: ...  # type: ignore[empty-body]

    def kill_source(self) -> None: ...

    def connect_to_areas(self, peer: PeerId, areas: Sequence[Shape]) -> None: ...

    def close(self) -> None: ...


class InProcess(Wired):
    def __init__(self, source_areas: Sequence[Shape], reader_areas: Sequence[Shape], poison: int = POISON) -> None:
        super().__init__(reader_areas, poison)
        self.network = InProcessNetwork(blocks_per_step=4)
        self.source_pool = Pool(source_areas)
        self.source = InProcessTransport(SOURCE, self.network, lambda event: None)
        self.source.register(self.source_pool.memory())
        self.transport = InProcessTransport(READER, self.network, self.events.append)
        self.transport.register(self.pool.memory())
        self.transport.connect(SOURCE, self.source.endpoint())
        self.now = 0.0

    def step(self) -> None:
        self.now += 0.01
        self.network.step(self.now)

    def fill(self, block: int, value: int) -> None:
        self.source_pool.blocks[block][:] = value

    def write(self, block: int, content: np.ndarray) -> None:
        self.source_pool.blocks[block][:] = content

    def set_generation(self, block: int, value: int) -> None:
        self.source_pool.generations[block] = value

    def digest(self, block: int) -> int:
        return block_digest(self.source_pool.memory(), block)

    def kill_source(self) -> None:
        self.network.kill(SOURCE)

    def connect_to_areas(self, peer: PeerId, areas: Sequence[Shape]) -> None:
        other = InProcessTransport(peer, self.network, lambda event: None)
        other.register(Pool(areas).memory())
        self.transport.connect(peer, other.endpoint())

    def close(self) -> None:
        self.transport.close(1.0)
        self.source.close(1.0)


class Nixl(Wired):
    """The source is another process: one agent per process, as in production."""

    def __init__(
        self, mode: str, source_areas: Sequence[Shape], reader_areas: Sequence[Shape], poison: int = POISON
    ) -> None:
        super().__init__(reader_areas, poison)
        self.options = {"pull_mode": mode, "ucx_net_devices": "lo"}
        self.source = SourceProcess(source_areas, self.options)
        self.transport = NixlTransport(READER, TransportConfig(**self.options), self.events.append)  # type: ignore[arg-type]
        self.transport.register(self.pool.memory())
        self.introduce(self.source, SOURCE)

    def introduce(self, source: SourceProcess, peer: PeerId) -> None:
        endpoint = self.transport.endpoint().hex()
        source.command(do="connect", worker=READER.worker_id, epoch=READER.epoch, endpoint=endpoint)
        self.transport.connect(peer, source.endpoint)

    def fill(self, block: int, value: int) -> None:
        self.source.command(do="fill", block=block, value=value)

    def write(self, block: int, content: np.ndarray) -> None:
        self.source.command(do="write", block=block, bytes=content.tobytes().hex())

    def set_generation(self, block: int, value: int) -> None:
        self.source.command(do="generation", block=block, value=value)

    def digest(self, block: int) -> int:
        return self.source.command(do="digest", block=block)["digest"]

    def kill_source(self) -> None:
        self.source.kill()

    def connect_to_areas(self, peer: PeerId, areas: Sequence[Shape]) -> None:
        endpoint = NixlEndpoint.unpack(self.source.endpoint)
        self.transport.connect(peer, replace(endpoint, areas=tuple(Pool(areas).areas)).pack())

    def close(self) -> None:
        self.transport.close(5.0)
        self.source.close()
