"""Virtual time, streams that keep order and break, and one-sided transfers that go on after they are given up."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from kv_transfer.handoff import PeerId
from kv_transfer.transport import PullFinal, PullOrder, PullOutcome, PullStatus, TransportEvent
from tests.scenarios.model import ScriptedModel

SILENCE_S = 3.0  # after which an end of a handoff stream gives up
KEEPALIVE_S = 4.0  # after which a router gives up on a silent worker


class Clock:
    """A queue of things to happen. `now` only moves here."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.events = 0

    def at(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + max(0.0, delay_s), next(self._numbers), call))

    def run(self, until: float, done: Callable[[], bool] = lambda: False, max_events: int = 400_000) -> None:
        while self._heap and self._heap[0][0] <= until and not done():
            self.now, _, call = heapq.heappop(self._heap)
            self.events += 1
            assert self.events < max_events, f"no end after {max_events} events at {self.now:.3f} s"
            call()
        if not done():
            self.now = max(self.now, until)


class Timer:
    """What a dispatcher expects of `call_later`."""

    def __init__(self, clock: Clock, delay_s: float, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call
        clock.at(delay_s, self._fire)

    def _fire(self) -> None:
        if self._call is not None:
            self._call()

    def cancel(self) -> None:
        self._call = None


@dataclass
class Weather:
    """What the network does at present, between names of nodes (workers by id, routers by id)."""

    latency_s: float
    jitter_s: float
    block_s: float
    duplicates: float  # share of handoff messages that come twice
    cut: dict[frozenset[str], float] = field(default_factory=dict)  # pair -> healed at
    deaf: dict[frozenset[str], float] = field(default_factory=dict)  # likewise, for messages only: data moves
    isolated: dict[str, float] = field(default_factory=dict)  # node -> healed at
    frozen: dict[tuple[str, str], float] = field(default_factory=dict)  # (source, reader): data alone -> thawed at
    slow: dict[tuple[str, str], float] = field(default_factory=dict)  # (source, reader) -> factor
    corrupt: dict[tuple[str, str], int] = field(default_factory=dict)  # (source, reader) -> blocks still to spoil

    def healed_at(self, a: str, b: str, now: float) -> float:
        """When messages between the two get through; `now` when they do."""
        return max(now, self.cut.get(frozenset((a, b)), 0.0), self.isolated.get(a, 0.0), self.isolated.get(b, 0.0))

    def messages_at(self, a: str, b: str, now: float) -> float:
        return max(self.healed_at(a, b, now), self.deaf.get(frozenset((a, b)), 0.0))


class Pipe:
    """One direction of a stream: in order, each after a latency, held while the way is cut. Closed, it loses all."""

    def __init__(self, clock: Clock, weather: Weather, rng: random.Random, a: str, b: str) -> None:
        self._clock, self._weather, self._rng = clock, weather, rng
        self._a, self._b = a, b
        self._last = 0.0
        self.open = True

    def send(self, deliver: Callable[[], None]) -> None:
        w = self._weather
        at = max(self._last, self._clock.now + w.latency_s + self._rng.random() * w.jitter_s)
        self._last = at
        self._clock.at(at - self._clock.now, lambda: self._arrive(deliver))

    def _arrive(self, deliver: Callable[[], None]) -> None:
        if not self.open:
            return
        healed = self._weather.messages_at(self._a, self._b, self._clock.now)
        if healed > self._clock.now:
            # Retransmission brings it after the cut, before anything that is sent then.
            self._last = max(self._last, healed)
            self._clock.at(healed - self._clock.now, lambda: self._arrive(deliver))
        else:
            deliver()


@dataclass(eq=False)
class _Transfer:
    order: PullOrder
    reader: SimTransport
    started: float
    copied: int = 0
    reported: bool = False
    ended: bool = False


class DataNetwork:
    """Where one-sided transfers happen. `passive`: a stopped process's memory can still be read."""

    def __init__(self, clock: Clock, weather: Weather, rng: random.Random, *, passive: bool) -> None:
        self.clock, self.weather, self.rng, self.passive = clock, weather, rng, passive
        self.transports: dict[PeerId, SimTransport] = {}
        self.silent: dict[PeerId, float] = {}  # vanished without a word -> when transfers notice
        self.stopped: Callable[[PeerId], bool] = lambda peer: False

    def start(self, transfer: _Transfer) -> None:
        self.clock.at(self._pace(transfer), lambda: self._advance(transfer))
        timeout = transfer.order.timeout_s
        self.clock.at(timeout, lambda: self._report(transfer, PullStatus.TIMED_OUT, f"no end within {timeout:g} s"))

    def _pace(self, transfer: _Transfer) -> float:
        edge = (transfer.order.source.worker_id, transfer.reader.peer.worker_id)
        return self.weather.block_s * self.weather.slow.get(edge, 1.0) * (0.5 + self.rng.random())

    def _advance(self, transfer: _Transfer) -> None:
        """One block, or the fence, or a wait."""
        if transfer.ended:
            return
        order, reader, now = transfer.order, transfer.reader, self.clock.now
        if self.transports.get(reader.peer) is not reader:
            transfer.ended = True  # the reader's process is gone, and its memory with it
            return
        source = self.transports.get(order.source)
        if source is None and self.silent.get(order.source, 0.0) > now:
            self.clock.at(0.02, lambda: self._advance(transfer))
            return
        if source is None:
            self._end(transfer, PullStatus.PEER_LOST, "the source is not reachable")
            return
        if order.source not in reader.connected:
            self._report(transfer, PullStatus.PEER_LOST, "the peer was disconnected")
        names = (order.source.worker_id, reader.peer.worker_id)
        blocked = max(self.weather.healed_at(*names, now), self.weather.frozen.get(names, 0.0))
        if blocked > now + SILENCE_S and not transfer.reported and self.rng.random() < 0.5:
            self.clock.at(SILENCE_S, lambda: self._end(transfer, PullStatus.PEER_LOST, "keepalive"))
            return
        if blocked > now or (not self.passive and self.stopped(order.source)):
            self.clock.at(max(blocked - now, 0.05), lambda: self._advance(transfer))
            return
        if transfer.copied < len(order.local_blocks):
            i = transfer.copied
            reader.model.kv[order.local_blocks[i]] = source.model.kv[order.remote_blocks[i]]
            if self.weather.corrupt.get(names, 0) > 0:
                self.weather.corrupt[names] -= 1
                reader.model.kv[order.local_blocks[i], 0] ^= 1 << 7
            transfer.copied += 1
            self.clock.at(self._pace(transfer), lambda: self._advance(transfer))
            return
        status, detail = reader.verify(order, source)
        self._end(transfer, status, detail)

    def _report(self, transfer: _Transfer, status: PullStatus, detail: str) -> None:
        """The outcome without finality: bytes go on landing."""
        if not transfer.reported and not transfer.ended:
            transfer.reported = True
            took = self.clock.now - transfer.started
            transfer.reader.tell(PullOutcome(transfer.order.pull_id, status, False, detail, took))

    def _end(self, transfer: _Transfer, status: PullStatus, detail: str) -> None:
        if transfer.ended:
            return
        transfer.ended = True
        if transfer.reported:
            transfer.reader.tell(PullFinal(transfer.order.pull_id))
        else:
            took = self.clock.now - transfer.started
            transfer.reader.tell(PullOutcome(transfer.order.pull_id, status, True, detail, took))


class SimTransport:
    """KvTransport over a DataNetwork."""

    name = "sim"

    def __init__(
        self, peer: PeerId, network: DataNetwork, model: ScriptedModel, tell: Callable[[TransportEvent], None]
    ) -> None:
        self.peer, self.model, self.tell = peer, model, tell
        self.connected: set[PeerId] = set()
        self._network = network
        self._transfers: dict[int, _Transfer] = {}
        network.transports[peer] = self

    def connect(self, peer: PeerId, endpoint: bytes = b"") -> None:
        self.connected.add(peer)

    def disconnect(self, peer: PeerId) -> None:
        self.connected.discard(peer)

    def submit(self, order: PullOrder) -> None:
        transfer = self._transfers[order.pull_id] = _Transfer(order, self, self._network.clock.now)
        self._network.start(transfer)

    def abandon(self, pull_id: int) -> None:
        transfer = self._transfers.get(pull_id)
        if transfer is not None:
            self._network._report(transfer, PullStatus.ABANDONED, "")

    def verify(self, order: PullOrder, source: SimTransport) -> tuple[PullStatus, str]:
        """As a transport does: generations after the data, then digests of what arrived."""
        for block, announced in zip(order.remote_blocks, order.generations, strict=True):
            found = int(source.model.generations[block])
            if found != announced:
                return PullStatus.FENCED, f"block {block} is at generation {found}, not {announced}"
        for block, digest in zip(order.local_blocks, order.digests, strict=bool(order.digests)):
            if self.model.digest(block) != digest:
                return PullStatus.DIGEST_MISMATCH, f"the bytes of block {block} are not what was announced"
        return PullStatus.ARRIVED, ""
