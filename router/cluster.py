"""Who is there, how loaded, and what this router has promised since they last said.

    registered ──stream open──> ready ──asks to leave──> draining
         ^                        └──stream broken──> lost ──heartbeats stop──> forgotten
         └────── redial ──────────────────────────────┘

One view is kept and updated by events; decisions read it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from router.policy import PoolsView, WorkerKey, WorkerView
from router.prefix_index import PrefixIndex
from settings.listeners import Listener


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class WorkerState(enum.Enum):
    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker registered with; fields as RegisterRequest in worker.proto."""

    key: WorkerKey
    role: Role
    address: str
    model: str
    layout_fingerprint: str
    block_tokens: int
    block_bytes: int
    total_blocks: int
    context_limit_tokens: int
    vocab_size: int
    transport: str = ""
    attention_backend: str = ""
    device: str = ""
    listeners: tuple[Listener, ...] = ()


@dataclass(frozen=True, slots=True)
class Promise:
    """What a dispatched leg will need and no report shows yet."""

    prefill_tokens: int
    blocks: int


@dataclass(slots=True, eq=False)
class WorkerEntry:
    info: WorkerInfo
    state: WorkerState = WorkerState.CONNECTING
    load: Any = None  # the last WorkerLoad, as it came; None before the first
    reported_at: float = 0.0
    heard_at: float = 0.0
    promises: dict[int, Promise] = field(default_factory=dict)  # by leg
    legs: set[int] = field(default_factory=set)
    next_block_event: int | None = None
    broken_sources: frozenset[WorkerKey] = frozenset()  # decode: whose KV does not reach it, as it reports

    @property
    def key(self) -> WorkerKey:
        return self.info.key

    @property
    def kind(self) -> tuple[str, str]:
        """Workers of one kind compute a prompt at one speed."""
        return self.info.device, self.info.layout_fingerprint

    def view(self, prefill_tokens_per_s: float) -> WorkerView:
        load, info = self.load, self.info
        promised_tokens = sum(p.prefill_tokens for p in self.promises.values())
        promised_blocks = sum(p.blocks for p in self.promises.values())
        reported_free = load.free_blocks if load is not None else info.total_blocks
        reported_backlog = load.prefill_backlog_tokens if load is not None else 0
        return WorkerView(
            key=info.key,
            total_blocks=info.total_blocks,
            free_blocks=max(0, reported_free - promised_blocks),
            block_tokens=info.block_tokens,
            block_bytes=info.block_bytes,
            # A report may include what we promised, or not yet: the larger is nearer the truth than the sum.
            backlog_tokens=max(reported_backlog, promised_tokens),
            running_sequences=load.running_sequences if load is not None else 0,
            step_ms=load.step_ms if load is not None else 0.0,
            prefill_tokens_per_s=prefill_tokens_per_s,
            pull_bytes_per_s=load.pull_bytes_per_s if load is not None else 0.0,
            layout_fingerprint=info.layout_fingerprint,
        )


class Cluster:
    def __init__(self) -> None:
        self.workers: dict[WorkerKey, WorkerEntry] = {}
        self.prefixes: PrefixIndex[WorkerKey] = PrefixIndex()

    # Membership.

    def registered(self, info: WorkerInfo, now: float, *, leaving: bool) -> tuple[WorkerEntry, list[WorkerEntry]]:
        """A heartbeat. Returns the entry (new if CONNECTING and unknown before) and older incarnations to drop."""
        entry = self.workers.get(info.key)
        if entry is None:
            entry = self.workers[info.key] = WorkerEntry(info)
        elif entry.info.listeners != info.listeners:
            entry.info = info  # it opened a socket since
        entry.heard_at = now
        if leaving and entry.state is WorkerState.READY:
            entry.state = WorkerState.DRAINING
        older = [
            e for e in self.workers.values() if e.key.worker_id == info.key.worker_id and e.key.epoch < info.key.epoch
        ]
        return entry, older

    def later_than(self, key: WorkerKey) -> WorkerInfo | None:
        """A later incarnation of the same worker, if one is known."""
        for known, entry in self.workers.items():
            if known.worker_id == key.worker_id and known.epoch > key.epoch:
                return entry.info
        return None

    def connected(self, key: WorkerKey, now: float) -> None:
        entry = self.workers[key]
        entry.state = WorkerState.READY
        entry.heard_at = now
        entry.next_block_event = None
        entry.load = None
        entry.broken_sources = frozenset()

    def draining(self, key: WorkerKey) -> None:
        entry = self.workers.get(key)
        if entry is not None and entry.state is WorkerState.READY:
            entry.state = WorkerState.DRAINING

    def lost(self, key: WorkerKey) -> list[int]:
        """The stream broke. Returns the legs that were on the worker."""
        entry = self.workers.get(key)
        if entry is None:
            return []
        entry.state = WorkerState.LOST
        self.prefixes.gone(key)
        legs = list(entry.legs)
        entry.legs.clear()
        entry.promises.clear()
        return legs

    def forget(self, key: WorkerKey) -> None:
        self.workers.pop(key, None)
        self.prefixes.gone(key)

    # Reports.

    def reported(
        self, key: WorkerKey, load: Any, now: float, broken_sources: frozenset[WorkerKey] = frozenset()
    ) -> None:
        entry = self.workers.get(key)
        if entry is not None:
            entry.broken_sources = broken_sources
            entry.load = load
            entry.reported_at = now

    def block_events(self, key: WorkerKey, first: int, events: list[tuple[str, list[bytes]]]) -> None:
        """("cleared" | "stored" | "removed", names). After a gap, what is known of the worker is forgotten."""
        entry = self.workers.get(key)
        if entry is None:
            return
        if entry.next_block_event is not None and first != entry.next_block_event:
            self.prefixes.cleared(key)
        entry.next_block_event = first + len(events)
        for kind, names in events:
            match kind:
                case "cleared":
                    self.prefixes.cleared(key)
                case "stored":
                    self.prefixes.stored(key, names)
                case _:
                    self.prefixes.removed(key, names)

    # The ledger.

    def dispatched(self, key: WorkerKey, leg: int, promise: Promise) -> None:
        entry = self.workers[key]
        entry.legs.add(leg)
        entry.promises[leg] = promise

    def computed(self, worker: WorkerKey, leg: int) -> None:
        """The leg's prompt is done: reports show it from here on."""
        entry = self.workers.get(worker)
        if entry is not None:
            entry.promises.pop(leg, None)

    def ended(self, key: WorkerKey, leg: int) -> None:
        entry = self.workers.get(key)
        if entry is not None:
            entry.promises.pop(leg, None)
            entry.legs.discard(leg)

    # Views.

    def ready(self, role: Role) -> list[WorkerEntry]:
        return [e for e in self.workers.values() if e.state is WorkerState.READY and e.info.role is role]

    def view(self) -> PoolsView:
        """Prefill rates are pooled over workers with the same device and layout: one worker's last few measurements
        are noise, and two such workers differ by their backlog, not by their speed.
        """
        decode, prefill = self.ready(Role.DECODE), self.ready(Role.PREFILL)
        measured: dict[tuple[str, str], list[float]] = {}
        for entry in (*decode, *prefill):
            if entry.load is not None and entry.load.prefill_tokens_per_s > 0:
                measured.setdefault(entry.kind, []).append(entry.load.prefill_tokens_per_s)
        rates = {kind: sum(values) / len(values) for kind, values in measured.items()}
        return PoolsView(
            decode=[e.view(rates.get(e.kind, 0.0)) for e in decode],
            prefill=[e.view(rates.get(e.kind, 0.0)) for e in prefill],
            broken_paths=frozenset((source, e.key) for e in decode for source in e.broken_sources),
        )

    def check_empty(self) -> None:
        """No request is live: nothing may be promised."""
        for entry in self.workers.values():
            assert not entry.promises, f"{entry.key}: promises left {entry.promises}"
            assert not entry.legs, f"{entry.key}: legs left {entry.legs}"
