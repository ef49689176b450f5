"""The transport of a worker of several ranks, and of any worker whose peers may have several.

To whoever decides what to pull it is one transport: one order, one outcome, one finality. Inside, each rank pulls what
it computes with from the ranks that hold it (kv_transfer/shards.py), all at the same time:

    order ──> rank 0 <── source ranks 0, 1 ──┐
          ──> rank 1 <── source ranks 2, 3 ──┴──> all is there, nothing is missing ──> the fence ──> ARRIVED
                any other outcome of any of them: the order's, at once; final when all of them are

1. meeting     endpoints name the degree and every rank's memory. The reader plans once who reads what from whom, proves
               that the plan leaves nothing out, and tells each of its ranks
2. data        an order becomes one for each pair of ranks that shares something of these blocks. Who is waited for is
               an explicit set of pairs: an outcome counts for the pair that it was asked of, once; any other is
               counted (`strays`) and changes nothing
3. proof       the pieces that came are added up. Something missing is a TRANSPORT_ERROR, whatever was reported
4. fence       the source's leader owns the generations of all its ranks' blocks. They are read once, by our leader,
               after the data of all ranks: one fence, all or nothing

Between workers of one rank each, orders and events pass through as they are.
"""

from __future__ import annotations

import itertools
import logging
import random
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kv_transfer.handoff import PeerId
from kv_transfer.layout import KvLayout
from kv_transfer.shards import MAX_DEGREE, Piece, Plan, missing, parts_from, pieces_of, unsound
from kv_transfer.transport import (
    AreaIndex,
    KvMemory,
    KvTransport,
    Parts,
    PullFinal,
    PullOrder,
    PullOutcome,
    PullStatus,
    TransportEvent,
)

log = logging.getLogger(__name__)

_MAGIC = b"dptranks"
_HEADER = struct.Struct("<8sI")
_LENGTH = struct.Struct("<I")
_OURS = 1 << 48  # pull ids from here on are of single ranks

Pair = tuple[int, int]  # rank of the reader, rank of the source
LEADERS: Pair = (0, 0)


class RankTransport(KvTransport, Protocol):
    """The transport of one rank: in this process, or in another one (kv_transfer/rank_link.py)."""

    last_turn: float
    oldest_pull_since: float | None

    def reachable(self, peer: PeerId) -> None: ...

    def forget(self, peer: PeerId) -> None: ...

    @property
    def alive(self) -> bool: ...


def pack_endpoints(endpoints: Sequence[bytes]) -> bytes:
    """Of a worker's ranks, in their order. One alone is as it is."""
    if len(endpoints) == 1:
        return endpoints[0]
    return _HEADER.pack(_MAGIC, len(endpoints)) + b"".join(_LENGTH.pack(len(e)) + e for e in endpoints)


def unpack_endpoints(data: bytes) -> list[bytes]:
    """Raises ValueError, naming what is wrong: it comes from a socket."""
    if data[: len(_MAGIC)] != _MAGIC:
        return [data]
    if len(data) < _HEADER.size:
        raise ValueError("an endpoint of several ranks ends in its header")
    _, degree = _HEADER.unpack_from(data)
    if not 2 <= degree <= MAX_DEGREE:
        raise ValueError(f"an endpoint of {degree} ranks; expected are 2 to {MAX_DEGREE}")
    endpoints, at = [], _HEADER.size
    for rank in range(degree):
        if at + _LENGTH.size > len(data):
            raise ValueError(f"an endpoint of {degree} ranks ends before rank {rank}")
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        endpoints.append(data[at : at + size])
        at += size
        if at > len(data):
            raise ValueError(f"an endpoint of {degree} ranks ends within rank {rank}")
    if at != len(data):
        raise ValueError(f"an endpoint of {degree} ranks is followed by {len(data) - at} bytes")
    return endpoints


@dataclass(frozen=True, slots=True)
class _Source:
    """A peer as we read from it."""

    degree: int
    plan: Plan


@dataclass(slots=True, eq=False)
class _Fan:
    """One order, while ranks work on it."""

    order: PullOrder
    groups: tuple[int, ...]
    pieces: dict[Pair, tuple[Piece, ...]]  # that each pair is to bring
    pending: dict[int, Pair] = field(default_factory=dict)  # by pull id: no outcome yet
    open: dict[int, Pair] = field(default_factory=dict)  # by pull id: bytes may still land
    arrived: list[list[Piece]] = field(default_factory=list)  # by rank
    duration_s: float = 0.0
    fenced: bool = False  # the fence is being read, or was
    reported: bool = False


class RankedTransport:
    """`deliver` is called on the threads of the ranks' transports and must not block."""

    def __init__(self, peer: PeerId, layout: KvLayout, degree: int, deliver: Callable[[TransportEvent], None]) -> None:
        """`layout` is the whole model's. Then `attach`: the ranks' transports deliver their events to `hear`."""
        self.peer, self.degree = peer, degree
        self._layout = layout
        self._deliver = deliver
        self._ranks: Sequence[RankTransport] = ()
        self._sources: dict[PeerId, _Source] = {}
        self._fans: dict[int, _Fan] = {}  # by the order's pull id
        self._parts: dict[int, _Fan] = {}  # by the pull id of a rank
        self._numbers = itertools.count(_OURS)
        self._lock = threading.RLock()  # orders, peers and events come from different threads
        self.strays = 0

    def attach(self, ranks: Sequence[RankTransport], memory: KvMemory | None = None) -> None:
        """The leader's first. The others' memories are registered already, with as many blocks each."""
        assert len(ranks) == self.degree
        self._ranks = ranks
        if memory is not None:
            self.register(memory)

    # KvTransport.

    @property
    def name(self) -> str:
        return self._ranks[0].name

    def describe(self) -> str:
        said = self._ranks[0].describe()
        return said if self.degree == 1 else f"{said}, {self.degree} ranks"

    def register(self, memory: KvMemory) -> None:
        """The leader's."""
        self._index: AreaIndex = memory.index
        self._ranks[0].register(memory)

    def endpoint(self) -> bytes:
        return pack_endpoints([rank.endpoint() for rank in self._ranks])

    def connect(self, peer: PeerId, endpoint: bytes, parts: Parts | None = None) -> None:
        """Its ranks are those that it names, in that order; nobody works them out a second time."""
        try:
            endpoints = unpack_endpoints(endpoint)
            with self._lock:
                source = self._sources.get(peer) or self._planned(peer, len(endpoints))
                if source.degree != len(endpoints):
                    raise ValueError(f"it had {source.degree} ranks before, and now {len(endpoints)}")
                self._sources[peer] = source
        except ValueError as error:
            log.warning("transport: cannot connect to %s: %s", peer.worker_id, error)
            return
        if self._passes(source):
            self._ranks[0].connect(peer, endpoint)
            return
        for rank, transport in enumerate(self._ranks):
            for number, of_rank in enumerate(endpoints):
                agreed = parts_from(self._layout, source.plan[rank], rank, self.degree, number, source.degree)
                transport.connect(replace(peer, rank=number), of_rank, agreed)

    def disconnect(self, peer: PeerId) -> None:
        for rank in self._ranks:
            for one in self._ranks_of(peer):
                rank.disconnect(one)

    def reachable(self, peer: PeerId) -> None:
        for rank in self._ranks:
            for one in self._ranks_of(peer):
                rank.reachable(one)

    def forget(self, peer: PeerId) -> None:
        for rank in self._ranks:
            for one in self._ranks_of(peer):
                rank.forget(one)
        with self._lock:
            self._sources.pop(peer, None)

    def submit(self, order: PullOrder) -> None:
        source = self._sources.get(order.source)
        if source is None or self._passes(source):
            self._ranks[0].submit(order)
            return
        problem = self._problem(order)
        if problem:
            self._deliver(PullOutcome(order.pull_id, PullStatus.TRANSPORT_ERROR, True, problem))
            return
        with self._lock:
            self._begin(order, source)

    def abandon(self, pull_id: int) -> None:
        with self._lock:
            fan = self._fans.get(pull_id)
            if fan is not None:
                self._fail(fan, PullStatus.ABANDONED, "")
                return
        self._ranks[0].abandon(pull_id)

    def close(self, timeout_s: float) -> None:
        for rank in reversed(self._ranks):
            rank.close(timeout_s)

    # For the watchdog: the worst of the ranks.

    @property
    def alive(self) -> bool:
        return all(rank.alive for rank in self._ranks)

    @property
    def last_turn(self) -> float:
        return min(rank.last_turn for rank in self._ranks)

    @property
    def silent_rank(self) -> str:
        """Whose turn was longest ago, in words; empty: there is only one."""
        if self.degree == 1:
            return ""
        return f" of rank {min(range(self.degree), key=lambda rank: self._ranks[rank].last_turn)}"

    @property
    def oldest_pull_since(self) -> float | None:
        since = [rank.oldest_pull_since for rank in self._ranks]
        return min((one for one in since if one is not None), default=None)

    # Meeting.

    def _planned(self, peer: PeerId, degree: int) -> _Source:
        """Raises ValueError for a plan that would leave something out."""
        load: list[int] = []
        if degree != self.degree:  # readers of one source begin with different ranks of it
            load = list(range(degree))
            random.Random(f"{self.peer} {peer}").shuffle(load)
        plan = pieces_of(self._layout, degree, self.degree, load)
        why = unsound(self._layout, degree, self.degree, plan)
        if why:
            raise ValueError(f"KV of {degree} ranks cannot be read by {self.degree}: {why}")
        return _Source(degree, plan)

    def _passes(self, source: _Source) -> bool:
        return source.degree == 1 and self.degree == 1

    def _ranks_of(self, peer: PeerId) -> list[PeerId]:
        source = self._sources.get(peer)
        return [peer] if source is None else [replace(peer, rank=rank) for rank in range(source.degree)]

    # An order.

    def _problem(self, order: PullOrder) -> str:
        if order.digests:
            return "digests are of whole blocks, and ranks hold parts of them; turn transport.digest off"
        if not self._index.holds(order.local_blocks):
            return "the id of a block is out of range"
        if len(order.local_blocks) != len(order.remote_blocks):
            return f"{len(order.local_blocks)} blocks for {len(order.remote_blocks)} of the peer"
        return ""

    def _begin(self, order: PullOrder, source: _Source) -> None:
        areas = self._index.areas_of(order.local_blocks)
        fan = self._fans[order.pull_id] = _Fan(order, tuple(sorted(set(areas))), {})
        fan.arrived = [[] for _ in self._ranks]
        orders: list[tuple[int, PullOrder]] = []
        for pair, pieces in _by_pair(source.plan).items():
            of_pair = tuple(piece for piece in pieces if piece.group in fan.groups)
            if order.local_blocks and not of_pair:
                continue
            fan.pieces[pair] = of_pair
            groups = {piece.group for piece in of_pair}
            chosen = [i for i, area in enumerate(areas) if area in groups]
            orders.append(self._part(fan, pair, order, chosen))
        if not order.local_blocks and LEADERS not in fan.pieces:
            fan.pieces[LEADERS] = ()
            orders.append(self._part(fan, LEADERS, order, []))
        for rank, one in orders:
            self._ranks[rank].submit(one)

    def _part(self, fan: _Fan, pair: Pair, order: PullOrder, chosen: Sequence[int]) -> tuple[int, PullOrder]:
        rank, number = pair
        pull_id = next(self._numbers)
        self._parts[pull_id] = fan
        fan.pending[pull_id] = fan.open[pull_id] = pair
        return rank, PullOrder(
            pull_id,
            replace(order.source, rank=number),
            tuple(order.remote_blocks[i] for i in chosen),
            tuple(order.local_blocks[i] for i in chosen),
            (),
            (),
            order.timeout_s,
        )

    # Events.

    def hear(self, rank: int, event: TransportEvent) -> None:
        if event.pull_id < _OURS:
            self._deliver(event)
            return
        with self._lock:
            fan = self._parts.get(event.pull_id)
            if fan is None or fan.open.get(event.pull_id, (-1, 0))[0] != rank:
                self.strays += 1
                return
            if isinstance(event, PullFinal):
                self._settled(fan, event.pull_id)
            else:
                self._outcome(fan, event)

    def _outcome(self, fan: _Fan, event: PullOutcome) -> None:
        pair = fan.pending.pop(event.pull_id, None)
        if pair is None:
            self.strays += 1
            return
        fan.duration_s = max(fan.duration_s, event.duration_s)
        if event.final:
            del fan.open[event.pull_id], self._parts[event.pull_id]
        if event.status is not PullStatus.ARRIVED:
            self._fail(fan, event.status, f"rank {pair[0]} from rank {pair[1]}: {event.detail}".rstrip(": "))
        elif fan.fenced:
            self._report(fan, PullStatus.ARRIVED, "")
        elif not fan.reported:
            fan.arrived[pair[0]] += fan.pieces[pair]
            if not fan.pending:
                self._fence(fan)
        self._maybe_final(fan)

    def _fence(self, fan: _Fan) -> None:
        """The data of all ranks is said to be there."""
        if not fan.order.local_blocks:
            self._report(fan, PullStatus.ARRIVED, "")
            return
        why = missing(self._layout, self.degree, fan.arrived, fan.groups)
        if why:
            self._fail(fan, PullStatus.TRANSPORT_ERROR, why)
            return
        fan.fenced = True
        rank, blank = self._part(fan, LEADERS, fan.order, ())
        order = replace(blank, remote_blocks=fan.order.remote_blocks, generations=fan.order.generations)
        self._ranks[rank].submit(order)

    def _fail(self, fan: _Fan, status: PullStatus, detail: str) -> None:
        if fan.reported:
            return
        self._report(fan, status, detail)
        for pull_id, (rank, _) in list(fan.pending.items()):
            self._ranks[rank].abandon(pull_id)

    def _report(self, fan: _Fan, status: PullStatus, detail: str) -> None:
        if fan.reported:
            return
        fan.reported = True
        final = not fan.open
        if final:
            self._forget(fan)
        self._deliver(PullOutcome(fan.order.pull_id, status, final, detail, fan.duration_s))

    def _settled(self, fan: _Fan, pull_id: int) -> None:
        del fan.open[pull_id], self._parts[pull_id]
        fan.pending.pop(pull_id, None)
        self._maybe_final(fan)

    def _maybe_final(self, fan: _Fan) -> None:
        """No byte of it can land any more, and that is not said yet."""
        if fan.reported and not fan.open and self._fans.get(fan.order.pull_id) is fan:
            self._forget(fan)
            self._deliver(PullFinal(fan.order.pull_id))

    def _forget(self, fan: _Fan) -> None:
        del self._fans[fan.order.pull_id]


def _by_pair(plan: Plan) -> dict[Pair, list[Piece]]:
    pairs: dict[Pair, list[Piece]] = {}
    for rank, pieces in enumerate(plan):
        for piece in pieces:
            pairs.setdefault((rank, piece.source_rank), []).append(piece)
    return pairs
