"""A transport inside one process: copies bytes between pools when stepped. For tests and the simulator.

Obeys KvTransport, including what is awkward about a real one: a pull takes time, the fence is read after the data,
and an abandoned pull goes on writing until it is final. Nothing happens outside `InProcessNetwork.step`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import xxhash

from kv_transfer.handoff import PeerId
from kv_transfer.transport import (
    AreaIndex,
    KvArea,
    KvMemory,
    Parts,
    PullFinal,
    PullOrder,
    PullOutcome,
    PullStatus,
    TransportEvent,
    misfit,
    not_agreed,
    unlike,
)


@dataclass(slots=True)
class _Active:
    order: PullOrder
    reader: InProcessTransport
    started: float
    copied: int = 0
    reported: bool = False


@dataclass(slots=True)
class InProcessNetwork:
    """Where transports of one process meet. `blocks_per_step` paces every pull; `stalled` sources answer nothing."""

    blocks_per_step: int = 1 << 30
    now: float = 0.0
    stalled: set[PeerId] = field(default_factory=set)
    transports: dict[PeerId, InProcessTransport] = field(default_factory=dict)
    _active: list[_Active] = field(default_factory=list)

    def step(self, now: float) -> None:
        """Move what can be moved by `now`."""
        self.now = now
        for active in list(self._active):
            self._advance(active, now)

    def kill(self, peer: PeerId) -> None:
        """The process is gone: its memory cannot be read, its pulls end."""
        self.transports.pop(peer, None)

    @property
    def busy(self) -> bool:
        return bool(self._active)

    def _advance(self, active: _Active, now: float) -> None:
        order, reader = active.order, active.reader
        source = self.transports.get(order.source)
        if reader.peer not in self.transports:
            self._active.remove(active)
            return
        if source is None or order.source not in reader.connected:
            self._end(active, PullStatus.PEER_LOST, f"{order.source.worker_id} is not reachable", final=True)
            return
        own, their, parts = reader.memory.index, source.memory.index, reader.connected[order.source]
        problem = None if active.copied else _problem(order, own, their, parts)
        if problem:
            self._end(active, PullStatus.TRANSPORT_ERROR, problem, final=True)
            return
        if order.source not in self.stalled:
            last = min(len(order.local_blocks), active.copied + self.blocks_per_step)
            for i in range(active.copied, last):
                local, remote = order.local_blocks[i], order.remote_blocks[i]
                copy(source.blocks[remote], reader.blocks[local], own.areas_of((local,))[0], parts)
            active.copied = last
            if last == len(order.local_blocks):
                status, detail = reader.verify(order, source)
                self._end(active, status, detail, final=True)
                return
        if not active.reported and now - active.started >= order.timeout_s:
            self._end(active, PullStatus.TIMED_OUT, f"no end within {order.timeout_s:g} s", final=False)

    def _end(self, active: _Active, status: PullStatus, detail: str, *, final: bool) -> None:
        if not active.reported:
            active.reader.deliver(PullOutcome(active.order.pull_id, status, final, detail, self.now - active.started))
        elif final:
            active.reader.deliver(PullFinal(active.order.pull_id))
        active.reported = True
        if final:
            self._active.remove(active)

    def add(self, order: PullOrder, reader: InProcessTransport) -> None:
        self._active.append(_Active(order, reader, self.now))

    def abandon(self, pull_id: int, reader: InProcessTransport) -> None:
        for active in self._active:
            if active.order.pull_id == pull_id and active.reader is reader and not active.reported:
                self._end(active, PullStatus.ABANDONED, "", final=False)
                return


class InProcessTransport:
    name = "inprocess"

    def __init__(self, peer: PeerId, network: InProcessNetwork, deliver: Callable[[TransportEvent], None]) -> None:
        self.peer = peer
        self.deliver = deliver
        self.connected: dict[PeerId, Parts | None] = {}
        self._network = network

    def describe(self) -> str:
        return "in process"

    def register(self, memory: KvMemory) -> None:
        self.memory = memory
        self.blocks = [block for area in memory.areas for block in _blocks_of(area)]
        self._network.transports[self.peer] = self

    def endpoint(self) -> bytes:
        return b"".join(struct.pack("<Q", area.block_bytes) for area in self.memory.areas)

    def connect(self, peer: PeerId, endpoint: bytes, parts: Parts | None = None) -> None:
        theirs = struct.unpack(f"<{len(endpoint) // 8}Q", endpoint)
        if not misfit([area.block_bytes for area in self.memory.areas], theirs, parts):
            self.connected.setdefault(peer, parts)

    def disconnect(self, peer: PeerId) -> None:
        self.connected.pop(peer, None)

    def submit(self, order: PullOrder) -> None:
        self._network.add(order, self)

    def abandon(self, pull_id: int) -> None:
        self._network.abandon(pull_id, self)

    def close(self, timeout_s: float) -> None:
        self._network.transports.pop(self.peer, None)

    def verify(self, order: PullOrder, source: InProcessTransport) -> tuple[PullStatus, str]:
        """After the data: the source's generations, then the digests of what arrived."""
        for block, announced in zip(order.remote_blocks, order.generations, strict=bool(order.generations)):
            found = int(source.memory.generations[block])
            if found != announced:
                return PullStatus.FENCED, f"block {block} is at generation {found}, announced was {announced}"
        for block, digest in zip(order.local_blocks, order.digests, strict=bool(order.digests)):
            if block_digest(self.memory, block) != digest:
                return PullStatus.DIGEST_MISMATCH, f"the bytes of block {block} are not what was announced"
        return PullStatus.ARRIVED, ""


def _problem(order: PullOrder, own: AreaIndex, their: AreaIndex, parts: Parts | None) -> str:
    if not order.local_blocks:
        return "" if their.holds(order.remote_blocks) else "the id of a block is out of range"
    problem = unlike(own, order.local_blocks, their, order.remote_blocks)
    return problem or not_agreed(parts, set(own.areas_of(order.local_blocks)))


def copy(source: np.ndarray, reader: np.ndarray, area: int, parts: Parts | None) -> None:
    """A block, or what is agreed of one."""
    if parts is None:
        reader[:] = source
        return
    for one in parts[area].slices:
        reader[one.reader_offset :][: one.num_bytes] = source[one.source_offset :][: one.num_bytes]


def _blocks_of(area: KvArea) -> np.ndarray:
    whole = (ctypes.c_uint8 * (area.block_bytes * area.num_blocks)).from_address(area.base_address)
    return np.ctypeslib.as_array(whole).reshape(area.num_blocks, area.block_bytes)


def block_digest(memory: KvMemory, block_id: int) -> int:
    """xxh3_64 of a block's bytes: catches corruption, not malice."""
    return xxhash.xxh3_64_intdigest(memory.read_block(block_id))
