"""Who is there, how loaded, and what this router has promised since they last said.

    registered ──stream open──> ready ──asks to leave──> draining
         ^                        └──stream broken──> lost ──heartbeats stop──> forgotten
         └────── redial ──────────────────────────────┘

One view is kept and updated by events; decisions read it.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from router.placement.adapter_words import AdaptersSaid
from router.placement.correction import Correction
from router.placement.newcomers import Arrivals
from router.placement.prefix_index import PrefixIndex
from router.placement.view import Pool, PoolsView, WorkerKey, WorkerView, room_for
from settings.listeners import Listener

_TRUSTED_ERROR = 0.4  # of a worker's learned step costs: beyond, its plain rate of prompt tokens is the better guess
_TEACHING_SHARE = 0.25  # of an estimated time to the first token, that may be waiting for others
_RATE_STEP = 0.03  # pooled rates move in such steps: a change concerns all workers of a kind


NO_ADAPTERS = AdaptersSaid()


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    STANDBY = "standby"  # it is sent nothing, and lends what its prefix cache holds


class WorkerState(enum.Enum):
    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker registered with; fields as RegisterRequest in worker.proto. Roles change: the entry has it."""

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
    metrics_address: str = ""
    model_identity: str = ""  # empty: it does not say
    fixed_bytes: int = 0
    trial: str = ""
    dtype: str = ""  # in which it computes
    role_changes: int = 0
    original_context_tokens: int = 0  # longer prompts share no prefix with shorter ones; 0: they do
    kept_tokens: int = 0
    adapters: AdaptersSaid = NO_ADAPTERS
    masks_tokens: bool = True  # it knows allowed_token_ids and bad_words
    group: str = ""  # of its pool; nothing is decided by it: what each worker can do is measured
    scores_prompts: bool = True  # it knows prompt_logprobs
    searches_beams: bool = True  # it knows beam search
    unquantized_identity: str = ""  # of its weights, before it quantized them
    pairing_fingerprint: str = ""  # equal: KV may be handed over where schemes of weights mix; empty: never
    weights: str = ""  # their scheme; empty: as the checkpoint has them

    def pairs_with(self, other: WorkerInfo) -> bool:
        """They differ in the scheme of their weights, at most."""
        return bool(self.pairing_fingerprint) and self.pairing_fingerprint == other.pairing_fingerprint

    def has_adapter(self, digest: str) -> bool:
        return self.adapters.has(digest)

    @property
    def pool_tokens(self) -> int:
        """Of the longest sequence that its pool holds."""
        return room_for(self.total_blocks * self.block_tokens, self.kept_tokens)

    def blocks_of(self, tokens: int) -> int:
        """That a sequence of so many tokens holds at a time."""
        if self.kept_tokens and tokens > self.kept_tokens:
            tokens = self.kept_tokens
        return -(-tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class Promise:
    """What a dispatched leg will need and no report shows yet.

    `incoming_bytes` of KV are to come from `source`: they queue there and here until the leg is computed or has ended.
    """

    prefill_tokens: int
    blocks: int
    sequences: int = 0  # that will decode there
    incoming_bytes: int = 0
    source: WorkerKey | None = None


@dataclass(slots=True)
class Learned:
    """What the estimates about one worker turned out to be worth."""

    ttft: Correction = field(default_factory=Correction)
    transfer: Correction = field(default_factory=Correction)
    step: Correction = field(default_factory=Correction)


@dataclass(slots=True, eq=False)
class WorkerEntry:
    info: WorkerInfo
    state: WorkerState = WorkerState.CONNECTING
    load: Any = None  # the last WorkerLoad, as it came; None before the first
    reported_at: float = 0.0
    heard_at: float = 0.0
    promises: dict[int, Promise] = field(default_factory=dict)  # by leg: not in the report yet
    transfers: dict[int, tuple[int, WorkerKey | None]] = field(default_factory=dict)  # by leg: bytes, from where
    queued_out_bytes: int = 0
    queued_in_bytes: int = 0
    legs: set[int] = field(default_factory=set)
    next_block_event: int | None = None
    broken_sources: frozenset[WorkerKey] = frozenset()  # whose KV does not reach it, as it reports
    learned: Learned = field(default_factory=Learned)
    last_split: bool | None = None
    arrivals: Arrivals = field(default_factory=Arrivals)
    key: WorkerKey = field(init=False)
    kind: tuple[str, ...] = field(init=False)  # workers of one kind compute a prompt at one speed
    role: Role = field(init=False)
    role_changes: int = field(init=False)  # by its own count

    def __post_init__(self) -> None:
        self.key = self.info.key
        self.role, self.role_changes = self.info.role, self.info.role_changes
        info = self.info
        self.kind = info.device, info.attention_backend, info.group, info.layout_fingerprint  # degree is in the second

    def view(self, prefill_tokens_per_s: float, pull_bytes_per_s: float, now: float, pairing: str = "") -> WorkerView:
        """Made anew with every event that concerns the worker, some thousand times a second: hence by position."""
        load, info, learned = self.load, self.info, self.learned
        promised_tokens = promised_blocks = arriving = 0
        for p in self.promises.values():
            promised_tokens += p.prefill_tokens
            promised_blocks += p.blocks
            arriving += p.sequences
        if load is None:
            return WorkerView(
                info.key,
                info.total_blocks,
                max(0, info.total_blocks - promised_blocks),
                info.block_tokens,
                info.block_bytes,
                0,
                arriving,
                0.0,
                prefill_tokens_per_s,
                pull_bytes_per_s,
                info.layout_fingerprint,
                promised_tokens,
                None,
                arriving,
                queued_out_bytes=self.queued_out_bytes,
                queued_in_bytes=self.queued_in_bytes,
                ttft=learned.ttft.value(now),
                transfer=learned.transfer.value(now),
                step=learned.step.value(now),
                last_split=self.last_split,
                newcomers=self.arrivals.value(now),
                fixed_bytes=info.fixed_bytes,
                kept_tokens=info.kept_tokens,
                pairing=pairing,
            )
        constant_ms = token_ms = pair_ms = 0.0
        if load.step_per_token_ms > 0 and load.step_cost_error < _TRUSTED_ERROR:
            constant_ms = load.step_constant_ms + load.step_per_sequence_ms
            token_ms, pair_ms = load.step_per_token_ms, load.step_per_attention_pair_ms
        free_blocks = load.free_blocks - load.waiting_blocks - promised_blocks
        return WorkerView(
            info.key,
            info.total_blocks,
            free_blocks if free_blocks > 0 else 0,
            info.block_tokens,
            info.block_bytes,
            load.prefill_backlog_tokens,
            load.running_sequences + arriving,
            load.step_ms,
            prefill_tokens_per_s,
            load.pull_bytes_per_s or pull_bytes_per_s,
            info.layout_fingerprint,
            promised_tokens,
            self.reported_at,
            arriving,
            load.decode_step_ms,
            load.chunk_tokens,
            self.queued_out_bytes,
            self.queued_in_bytes,
            constant_ms,
            token_ms,
            pair_ms,
            learned.ttft.value(now),
            learned.transfer.value(now),
            learned.step.value(now),
            self.last_split,
            self.arrivals.value(now),
            info.fixed_bytes,
            info.kept_tokens,
            pairing,
        )


BlockEvent = tuple[str, Any]  # ("cleared", None), ("stored", runs of (parent, hints)), ("removed", hints)


class _PooledRate:
    """A rate that workers of one kind share, as far as they have measured it."""

    __slots__ = ("by_worker", "mean", "total")

    def __init__(self) -> None:
        self.by_worker: dict[WorkerKey, float] = {}
        self.total = 0.0
        self.mean = 0.0  # as the views have it

    def put(self, key: WorkerKey, rate: float) -> bool:
        """True: the mean has moved so far that views must be told."""
        old = self.by_worker.get(key, 0.0)
        if rate == old:
            return False
        if rate > 0:
            self.by_worker[key] = rate
        else:
            del self.by_worker[key]
            rate = 0.0
        self.total += rate - old
        mean = self.total / len(self.by_worker) if self.by_worker else 0.0
        if abs(mean - self.mean) <= _RATE_STEP * self.mean:
            return False
        self.mean = mean
        return True


class Cluster:
    """`mixed`: workers that differ in the scheme of their weights serve together (router.mixed_quantization)."""

    def __init__(self, *, mixed: bool = False) -> None:
        self.mixed = mixed
        self.workers: dict[WorkerKey, WorkerEntry] = {}
        self.switches: Counter[tuple[str, str]] = Counter()  # from, to
        self.prefixes: PrefixIndex[WorkerKey] = PrefixIndex()
        self.adapter_changes = 0
        self._broken: set[tuple[WorkerKey, WorkerKey]] = set()
        self._view = PoolsView(Pool(), Pool(), self._broken)
        self._prefill_rates: defaultdict[tuple[str, ...], _PooledRate] = defaultdict(_PooledRate)
        self._pull_rates: defaultdict[tuple[str, ...], _PooledRate] = defaultdict(_PooledRate)
        self._now = 0.0

    # Membership.

    def registered(self, info: WorkerInfo, now: float, *, leaving: bool) -> tuple[WorkerEntry, list[WorkerEntry]]:
        """A heartbeat. Returns the entry (new if CONNECTING and unknown before) and older incarnations to drop."""
        entry = self.workers.get(info.key)
        if entry is None:
            entry = self.workers[info.key] = WorkerEntry(info)
        elif entry.info.listeners != info.listeners:
            entry.info = replace(info, adapters=entry.info.adapters)  # it opened a socket since
        self.said_adapters(info.key, info.adapters)
        entry.heard_at = self._now = now
        if leaving and entry.state is WorkerState.READY:
            self._leave(entry, WorkerState.DRAINING)
        older = [
            e for e in self.workers.values() if e.key.worker_id == info.key.worker_id and e.key.epoch < info.key.epoch
        ]
        return entry, older

    def said_role(self, key: WorkerKey, role: Role, changes: int) -> bool:
        """A worker's word on what it is to be sent, over its stream or with a heartbeat. True: that is news.

        Nothing else changes: its legs, its prefixes, its links and what its estimates were worth stay.
        """
        entry = self.workers.get(key)
        if entry is None or changes <= entry.role_changes:
            return False
        entry.role_changes = changes
        if role is entry.role:
            return False
        self.switches[entry.role.value, role.value] += 1
        self._pool(entry).drop(key)
        entry.role = role
        self._refresh(entry)
        return True

    def said_adapters(self, key: WorkerKey, said: AdaptersSaid) -> None:
        """With a heartbeat, or in answer to a command: the later word counts."""
        entry = self.workers.get(key)
        if entry is not None and said.changes > entry.info.adapters.changes:
            entry.info = replace(entry.info, adapters=said)
            self.adapter_changes += 1

    def of_another_model(self, info: WorkerInfo) -> WorkerInfo | None:
        """A worker that is here with other weights under the same name, and does not mix with them."""
        for entry in self.workers.values():
            theirs = entry.info.model_identity
            differs = theirs and info.model_identity and theirs != info.model_identity
            if self.mixed and info.pairs_with(entry.info):
                continue
            if differs and entry.state is not WorkerState.LOST and entry.key.worker_id != info.key.worker_id:
                return entry.info
        return None

    def exchange(self, one: WorkerInfo, other: WorkerInfo) -> bool:
        """Whether KV may be handed over between them."""
        return one.layout_fingerprint == other.layout_fingerprint or (self.mixed and one.pairs_with(other))

    def later_than(self, key: WorkerKey) -> WorkerInfo | None:
        """A later incarnation of the same worker, if one is known."""
        for known, entry in self.workers.items():
            if known.worker_id == key.worker_id and known.epoch > key.epoch:
                return entry.info
        return None

    def connected(self, key: WorkerKey, now: float) -> None:
        entry = self.workers[key]
        entry.state = WorkerState.READY
        entry.heard_at = self._now = now
        entry.next_block_event = None
        entry.load = None
        self._set_broken(entry, frozenset())
        self._refresh(entry)

    def draining(self, key: WorkerKey) -> None:
        entry = self.workers.get(key)
        if entry is not None and entry.state is WorkerState.READY:
            self._leave(entry, WorkerState.DRAINING)

    def lost(self, key: WorkerKey) -> list[int]:
        """The stream broke. Returns the legs that were on the worker."""
        entry = self.workers.get(key)
        if entry is None:
            return []
        self._leave(entry, WorkerState.LOST)
        self.prefixes.gone(key)
        legs = list(entry.legs)
        entry.legs.clear()
        entry.promises.clear()
        for leg in list(entry.transfers):
            self._arrived(entry, leg)
        return legs

    def forget(self, key: WorkerKey) -> None:
        self.lost(key)
        self.workers.pop(key, None)
        self.prefixes.gone(key)

    def _leave(self, entry: WorkerEntry, state: WorkerState) -> None:
        """It is not chosen any more."""
        entry.state = state
        self._pool(entry).drop(entry.key)
        self._set_broken(entry, frozenset())
        self._measured(entry, 0.0, 0.0)

    # Reports.

    def reported(
        self, key: WorkerKey, load: Any, now: float, broken_sources: frozenset[WorkerKey] = frozenset()
    ) -> None:
        entry = self.workers.get(key)
        if entry is None:
            return
        self._set_broken(entry, broken_sources)
        entry.load = load
        entry.reported_at = self._now = now
        seen = load.last_sequence_id  # of this router's: the report counts it
        for leg in [leg for leg in entry.promises if leg <= seen]:
            del entry.promises[leg]
        self._measured(entry, load.prefill_tokens_per_s, load.pull_bytes_per_s)
        self._refresh(entry)

    def _measured(self, entry: WorkerEntry, prefill_tokens_per_s: float, pull_bytes_per_s: float) -> None:
        kind = entry.kind
        prefill, pull = self._prefill_rates[kind], self._pull_rates[kind]
        moved = prefill.put(entry.key, prefill_tokens_per_s)
        moved |= pull.put(entry.key, pull_bytes_per_s)
        if moved:
            for other in self.workers.values():
                if other.kind == kind:
                    self._refresh(other)

    def _set_broken(self, entry: WorkerEntry, sources: frozenset[WorkerKey]) -> None:
        if sources != entry.broken_sources:
            self._broken.difference_update((source, entry.key) for source in entry.broken_sources)
            self._broken.update((source, entry.key) for source in sources)
            entry.broken_sources = sources

    def block_events(self, key: WorkerKey, first: int, events: list[BlockEvent]) -> bool:
        """False: some are missing. What was known of the worker is forgotten, and a snapshot should be asked for."""
        entry = self.workers.get(key)
        if entry is None:
            return True
        snapshot = bool(events) and events[0][0] == "cleared"
        complete = snapshot or entry.next_block_event is None or first == entry.next_block_event
        if not complete:
            self.prefixes.cleared(key)
        entry.next_block_event = first + len(events)
        for kind, what in events:
            match kind:
                case "cleared":
                    self.prefixes.cleared(key)
                case "stored":
                    for parent, hints in what:
                        self.prefixes.stored(key, hints, parent)
                case _:
                    self.prefixes.removed(key, what)
        return complete

    # The ledger.

    def dispatched(self, key: WorkerKey, leg: int, promise: Promise) -> None:
        entry = self.workers[key]
        entry.legs.add(leg)
        entry.promises[leg] = promise
        known = self._pool(entry).find(key)
        if promise.prefill_tokens and known is not None:
            entry.arrivals.sent(known.beside_decodes_ms(promise.prefill_tokens), self._now)
        if promise.incoming_bytes:
            entry.transfers[leg] = promise.incoming_bytes, promise.source
            entry.queued_in_bytes += promise.incoming_bytes
            source = self.workers.get(promise.source) if promise.source is not None else None
            if source is not None:
                source.queued_out_bytes += promise.incoming_bytes
                self._refresh(source)
        self._refresh(entry)

    def decided(self, decode: WorkerKey, *, split: bool) -> None:
        """By estimates, not by a pin: the next decision on this worker leans towards the same."""
        entry = self.workers.get(decode)
        if entry is not None:
            entry.last_split = split

    def computed(self, worker: WorkerKey, leg: int) -> None:
        """The leg's prompt is done: reports show it from here on."""
        entry = self.workers.get(worker)
        if entry is not None:
            self._settle(entry, leg)

    def ended(self, key: WorkerKey, leg: int) -> None:
        entry = self.workers.get(key)
        if entry is not None:
            entry.legs.discard(leg)
            self._settle(entry, leg)

    def _settle(self, entry: WorkerEntry, leg: int) -> None:
        had_promise = entry.promises.pop(leg, None) is not None
        if self._arrived(entry, leg) or had_promise:
            self._refresh(entry)

    def _arrived(self, entry: WorkerEntry, leg: int) -> bool:
        transfer = entry.transfers.pop(leg, None)
        if transfer is None:
            return False
        num_bytes, source_key = transfer
        entry.queued_in_bytes -= num_bytes
        source = self.workers.get(source_key) if source_key is not None else None
        if source is not None:
            source.queued_out_bytes = max(0, source.queued_out_bytes - num_bytes)
            self._refresh(source)
        return True

    # What estimates were worth.

    def learned_ttft(
        self, worker: WorkerKey, predicted_ms: float, actual_ms: float, now: float, backlog_ms: float = 0.0
    ) -> None:
        """All three take the estimate as it was before any correction.

        Where most of it is waiting for others (`backlog_ms`), what came of it says more about the order of prompts, who
        passed whom and who was put back, than about the worker.
        """
        entry = self.workers.get(worker)
        if entry is not None and backlog_ms <= _TEACHING_SHARE * predicted_ms:
            entry.learned.ttft.observe(predicted_ms, actual_ms, now)

    def learned_handoff(self, reader: WorkerKey, predicted_ms: float, actual_ms: float, now: float) -> None:
        entry = self.workers.get(reader)
        if entry is not None:
            entry.learned.transfer.observe(predicted_ms, actual_ms, now)

    def learned_itl(self, decode: WorkerKey, predicted_ms: float, actual_ms: float, now: float) -> None:
        entry = self.workers.get(decode)
        if entry is not None:
            entry.learned.step.observe(predicted_ms, actual_ms, now)

    # Views.

    def ready(self, role: Role) -> list[WorkerEntry]:
        return [e for e in self.workers.values() if e.state is WorkerState.READY and e.role is role]

    def view(self) -> PoolsView:
        """Always the same object, kept up to date: read it now, keep nothing of it.

        Prefill rates are pooled over workers with the same device and layout: one worker's last few measurements are
        noise, and two such workers differ by their backlog, not by their speed.
        """
        return self._view

    def _pool(self, entry: WorkerEntry) -> Pool:
        match entry.role:
            case Role.DECODE:
                return self._view.decode
            case Role.PREFILL:
                return self._view.prefill
            case Role.STANDBY:
                return self._view.standby

    def _refresh(self, entry: WorkerEntry) -> None:
        if entry.state is not WorkerState.READY:
            return
        kind = entry.kind
        pairing = entry.info.pairing_fingerprint if self.mixed else ""
        view = entry.view(self._prefill_rates[kind].mean, self._pull_rates[kind].mean, self._now, pairing)
        self._pool(entry).put(view)

    def check_empty(self) -> None:
        """No request is live: nothing may be promised. Whoever is ready is in one pool."""
        pools = {Role.DECODE: self._view.decode, Role.PREFILL: self._view.prefill, Role.STANDBY: self._view.standby}
        for role, pool in pools.items():
            members = sorted(view.key for view in pool)
            assert members == sorted(e.key for e in self.ready(role)), f"{role.value}: the pool has {members}"
        for entry in self.workers.values():
            assert not entry.promises, f"{entry.key}: promises left {entry.promises}"
            assert not entry.legs, f"{entry.key}: legs left {entry.legs}"
            assert not entry.transfers, f"{entry.key}: transfers left {entry.transfers}"
            assert not entry.queued_in_bytes
            assert not entry.queued_out_bytes, f"{entry.key}: {entry.queued_out_bytes} bytes are said to be queued"
