"""A cluster of leap workers under the router's cluster view, prefix index and decide().

    arrival ─ router_ms ─> prefix index ─> policy ─> legs, promises
      local   D.add ──────────────────> first token ──> answer
      split   P.add(hand_over) ─ chunks ─> room at D, then KV over both NICs ─┐
                               └ first token ──────> client                   ├─> D.adopt ──> answer
                                                      all bytes + handoff_ms ─┘

The router hears of loads and of cached blocks every `report_every_s` only; in between it knows its own promises.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.admission import AnswerLength
from router.cluster import Cluster, Promise, Role, WorkerInfo
from router.policy import PolicyParams, Rejection, RequestFacts, WorkerKey
from simulator.cost_model import CostModel
from simulator.leap_worker import Job, LeapWorker, WorkerLimits
from simulator.loop import EventLoop
from simulator.network import Nic, move
from simulator.outcome import Outcome
from simulator.policies import Policy
from simulator.prefix_cache import PrefixCache
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, TraceRequest

BLOCK_TOKENS = 64  # of the workers; caches and index work on the trace's blocks
REPORT_SLOTS = 16  # workers report in turns
_FIRST_TRY_S = 0.5  # a request that found nobody waits that long
_MAX_MOVES = 4
MAX_TOKENS = 1 << 14  # what clients ask for: how long an answer will be, only the trace knows
_MIN_ITL_STEPS = 6  # as router/dispatcher.py


@dataclass(slots=True)
class Load:
    """What a worker reports; fields as WorkerLoad in cluster.proto."""

    running_sequences: int = 0
    waiting_sequences: int = 0
    prefill_backlog_tokens: int = 0
    context_tokens: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    step_ms: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    pull_bytes_per_s: float = 0.0
    decode_step_ms: float = 0.0
    chunk_tokens: int = 0
    waiting_blocks: int = 0
    last_sequence_id: int = 0
    step_constant_ms: float = 0.0
    step_per_sequence_ms: float = 0.0
    step_per_token_ms: float = 0.0
    step_per_context_token_ms: float = 0.0
    step_per_attention_pair_ms: float = 0.0
    step_cost_error: float = 1.0


@dataclass(slots=True, eq=False)
class Flight:
    """A request under way."""

    request: TraceRequest
    outcome: Outcome
    names: Sequence[int]
    decode: FastWorker | None = None
    prefill: FastWorker | None = None
    decode_leg: int = 0
    prefill_leg: int = 0
    decode_job: Job | None = None
    prefill_job: Job | None = None
    first_chunk_s: float = -1.0
    moved_tokens: int = 0  # computed on P so far, cached ones included
    sent_tokens: int = 0
    reserved: bool = False
    arrives_s: float = math.inf
    all_sent: bool = False
    estimates: Mapping[str, float] = field(default_factory=dict)
    learned: bool = False
    exclude: frozenset[WorkerKey] = frozenset()


@dataclass(slots=True, eq=False)
class FastWorker:
    key: WorkerKey
    role: Role
    engine: LeapWorker
    nic: Nic
    flights: dict[int, Flight] = field(default_factory=dict)  # by number
    no_room: list[Flight] = field(default_factory=list)
    held_tokens: int = 0  # of sequences that are to be received and have no room yet
    newest_leg: int = 0
    said: Load | None = None
    pull_bytes_per_s: float = 0.0


@dataclass(slots=True)
class Sample:
    """Of the pools, for the report."""

    at_s: float
    prefill_busy: float
    decode_busy: float
    running: int
    waiting_tokens: int
    kv_share: float


class FastCluster:
    """One run. `crashes` are (time, index of worker over decode then prefill)."""

    def __init__(
        self,
        spec: ClusterSpec,
        costs: CostModel,
        policy: Policy,
        seed: int,
        *,
        sample_every_s: float = 0.0,
        crashes: Sequence[tuple[float, int]] = (),
        params: Mapping[str, float | bool] | None = None,
    ) -> None:
        self.spec, self.costs, self.policy = spec, costs, policy
        self.loop = EventLoop()
        self.rng = random.Random(f"{seed}/policy")
        self.cluster = Cluster()
        self.params = policy_params(spec, params or {})
        self.samples: list[Sample] = []
        self._sample_every_s = sample_every_s
        self._crashes = crashes
        self._legs = 0
        self._jobs = 0
        self._live = 0
        self._isolated: dict[int, float] = {}
        self._answer_tokens = AnswerLength()
        c = costs.step  # what an engine learns of its steps; it is taken to have learned it well
        self._learned_step = (
            c.constant_ms,
            c.per_sequence_ms,
            c.per_token_ms,
            c.per_context_token_ms,
            c.per_attention_pair_ms,
            0.0,
        )
        self.workers = [self._worker(f"d{i}", Role.DECODE, spec.decode) for i in range(spec.decode.workers)]
        self.workers += [self._worker(f"p{i}", Role.PREFILL, spec.prefill) for i in range(spec.prefill.workers)]
        self._by_key = {w.key: w for w in self.workers}

    def _worker(self, name: str, role: Role, pool: PoolSpec) -> FastWorker:
        spec, costs = self.spec, self.costs
        capacity = spec.kv_capacity_tokens or costs.kv_capacity_tokens
        limits = WorkerLimits(
            pool.max_batch_tokens,
            min(pool.max_running_sequences, pool.max_batch_tokens),
            spec.itl_target_ms * spec.step_share if pool.adaptive_chunks else math.inf,
            due_dates=spec.overload == "put_back",
        )
        key = WorkerKey(name, 1)
        info = WorkerInfo(
            key, role, name, "simulated", "simulated", BLOCK_TOKENS, BLOCK_TOKENS * costs.kv_bytes_per_token,
            capacity // BLOCK_TOKENS, 1 << 20, 1 << 17,
        )  # fmt: skip
        self.cluster.registered(info, 0.0, leaving=False)
        self.cluster.connected(key, 0.0)
        engine = LeapWorker(
            self.loop, len(self._workers_so_far()), costs.step, limits, PrefixCache(capacity, 512),
            self._first_token, self._chunk, self._answered, self._room,
        )  # fmt: skip
        return FastWorker(key, role, engine, Nic(spec.nic_gbytes_per_s * 1e9))

    def _workers_so_far(self) -> Sequence[FastWorker]:
        return getattr(self, "workers", ())

    # A run.

    def run(self, trace: Trace, on_done: Callable[[int], None] | None = None) -> list[Outcome]:
        """Outcomes in the order of arrival. `on_done(number of requests ended)` is called now and then."""
        outcomes: list[Outcome] = []
        self._trace = iter(trace.requests)
        self._outcomes = outcomes
        self._on_done = on_done
        self._ended = 0
        self._coming = True
        for index, worker in enumerate(self.workers):
            worker.engine.index = index
            worker.engine.cache.block_tokens = trace.block_tokens
        self._next_arrival()
        for slot in range(min(REPORT_SLOTS, len(self.workers))):
            self.loop.at(slot * self.spec.report_every_s / REPORT_SLOTS, self._report, slot)
        if self._sample_every_s:
            self._last_busy = [0.0] * len(self.workers)
            self.loop.at(self._sample_every_s, self._sample)
        for at_s, index in self._crashes:
            self.loop.at(at_s, self._crash, index)
        self.loop.run()
        return outcomes

    def isolated_s(self, prompt_tokens: int) -> float:
        """TTFT of a prompt that has a worker for itself and nothing cached."""
        known = self._isolated.get(prompt_tokens)
        if known is None:
            chunk = max(self.spec.prefill.max_batch_tokens, 8192)
            known = self._isolated[prompt_tokens] = self.costs.step.prompt_ms(prompt_tokens, chunk) / 1e3
        return known

    def _next_arrival(self) -> None:
        request = next(self._trace, None)
        if request is None:
            self._coming = False
        else:
            self.loop.at(request.arrival_s, self._arrive, request)

    def _arrive(self, request: TraceRequest) -> None:
        isolated = self.isolated_s(request.prompt_tokens)
        target = self.spec.ttft_base_s + self.spec.ttft_isolated_factor * isolated
        outcome = Outcome(len(self._outcomes), request.arrival_s, request.prompt_tokens, request.output_tokens, target)
        self._outcomes.append(outcome)
        self._live += 1
        self.loop.at(
            self.loop.now + self.spec.router_ms / 1e3, self._dispatch, Flight(request, outcome, request.blocks)
        )
        self._next_arrival()

    def _dispatch(self, flight: Flight) -> None:
        now, request, o = self.loop.now, flight.request, flight.outcome
        cached: Mapping[WorkerKey, int] = {}
        if flight.names:
            cached = self.cluster.prefixes.match(flight.names, self.workers[0].engine.cache.block_tokens)
        facts = RequestFacts(
            request.prompt_tokens,
            MAX_TOKENS,
            cached_tokens=cached,
            exclude=flight.exclude,
            expected_tokens=self._answer_tokens.expected(MAX_TOKENS),
            waited_ms=(now - o.arrival_s) * 1e3,
        )
        route = self.policy.place(facts, self.cluster.view(), self.params, now, self.rng)
        if isinstance(route, Rejection):
            o.refused = True
            self._end(flight)
            return
        o.rule, o.split = route.rule, route.split
        estimates = flight.estimates = route.estimates
        o.predicted_ttft_ms = estimates["ttft_ms"]
        if not route.rule.startswith("pinned"):
            self.cluster.decided(route.decode, split=route.split)
        decode = flight.decode = self._by_key[route.decode]
        o.decode = decode.engine.index
        blocks = -(-request.prompt_tokens // BLOCK_TOKENS)
        due_s = now + estimates.get("due_ms", 0.0) / 1e3
        flight.decode_leg = self._new_leg(decode)
        decode.flights[o.number] = flight
        flight.decode_job = self._job(flight, due_s)
        if route.prefill is None:
            promise = Promise(int(estimates["uncached_on_decode_tokens"]), blocks, 1)
            self.cluster.dispatched(decode.key, flight.decode_leg, promise)
            decode.engine.add(flight.decode_job)
            return
        prefill = flight.prefill = self._by_key[route.prefill]
        o.prefill = prefill.engine.index
        promise = Promise(0, blocks, 1, int(estimates["transfer_bytes"]), prefill.key)
        self.cluster.dispatched(decode.key, flight.decode_leg, promise)
        decode.held_tokens += request.prompt_tokens
        flight.prefill_leg = self._new_leg(prefill)
        promise = Promise(int(estimates["uncached_on_prefill_tokens"]), blocks)
        self.cluster.dispatched(prefill.key, flight.prefill_leg, promise)
        prefill.flights[o.number] = flight
        flight.prefill_job = self._job(flight, due_s, hand_over=True)
        prefill.engine.add(flight.prefill_job)

    def _new_leg(self, worker: FastWorker) -> int:
        self._legs += 1
        worker.newest_leg = self._legs
        return self._legs

    def _job(self, flight: Flight, due_s: float, *, hand_over: bool = False) -> Job:
        self._jobs += 1
        r = flight.request
        return Job(self._jobs, flight, r.prompt_tokens, r.output_tokens, flight.names, hand_over, due_s)

    # What workers say.

    def _first_token(self, engine: LeapWorker, job: Job) -> None:
        flight: Flight = job.flight
        o = flight.outcome
        if o.first_token_s < 0:
            o.first_token_s = self.loop.now
            self._learn_ttft(flight)
        o.cached_tokens = job.cached
        if not job.hand_over:
            self.cluster.computed(self.workers[engine.index].key, flight.decode_leg)
            return
        prefill, decode = self.workers[engine.index], flight.decode
        assert decode is not None
        self.cluster.ended(prefill.key, flight.prefill_leg)
        if job.output_tokens == 1:  # nothing to read
            prefill.flights.pop(o.number, None)
            self._leave(flight, decode)
            self._forget_reservation(flight, decode)
            return
        flight.all_sent = True
        self._send(flight)

    def _learn_ttft(self, flight: Flight) -> None:
        """What the router learns from its own estimates, as Dispatcher does."""
        o, computing = flight.outcome, flight.prefill or flight.decode
        if o.moves or computing is None:
            return
        actual_ms = (self.loop.now - o.arrival_s) * 1e3 - self.spec.router_ms
        self.cluster.learned_ttft(computing.key, flight.estimates["uncorrected_ttft_ms"], actual_ms, self.loop.now)

    def _learn_itl(self, flight: Flight, decode: FastWorker) -> None:
        o, e = flight.outcome, flight.estimates
        steps = o.output_tokens - 2
        if o.moves or steps < _MIN_ITL_STEPS:
            return
        second_s = o.first_token_s + o.handoff_gap_ms / 1e3  # 0 where it was not split: one gap more does not matter
        actual_ms = (o.finished_s - second_s) * 1e3 / (steps + (not o.split))
        self.cluster.learned_itl(decode.key, e["uncorrected_itl_ms"], actual_ms, self.loop.now)

    def _chunk(self, engine: LeapWorker, job: Job, tokens: int, first_end_s: float, last_tokens: int) -> None:
        flight: Flight = job.flight
        if flight.first_chunk_s < 0:
            flight.first_chunk_s = first_end_s
            flight.moved_tokens = job.cached  # P's cached blocks are announced with the first chunk
            self._reserve(flight)
        flight.moved_tokens += tokens
        if flight.reserved and job.computed < job.goal:
            self._move(flight, first_end_s, last_tokens)

    def _reserve(self, flight: Flight) -> bool:
        decode, job = flight.decode, flight.decode_job
        assert decode is not None
        assert job is not None
        if decode.engine.reserve(job):
            flight.reserved = True
            decode.held_tokens -= job.prompt_tokens
            flight.sent_tokens = job.computed  # cached there: not sent
            return True
        decode.no_room.append(flight)
        return False

    def _room(self, engine: LeapWorker) -> None:
        worker = self.workers[engine.index]
        while worker.no_room:
            flight = worker.no_room[0]
            if not worker.engine.reserve(_present(flight.decode_job)):
                return
            worker.no_room.pop(0)
            flight.reserved = True
            worker.held_tokens -= flight.request.prompt_tokens
            flight.sent_tokens = _present(flight.decode_job).computed
            self._send(flight)

    def _send(self, flight: Flight) -> None:
        """All that is announced and not sent yet; then, if that was all, adoption."""
        if not flight.reserved:
            return
        self._move(flight, self.loop.now, min(flight.request.prompt_tokens, 128))
        if flight.all_sent:
            self.loop.at(max(flight.arrives_s, self.loop.now) + self.spec.handoff_ms / 1e3, self._adopt, flight)

    def _move(self, flight: Flight, first_ready_s: float, last_tokens: int) -> None:
        tokens = flight.moved_tokens - flight.sent_tokens
        if tokens <= 0:
            flight.arrives_s = self.loop.now if flight.arrives_s == math.inf else flight.arrives_s
            return
        per_token = self.costs.kv_bytes_per_token
        last = min(tokens, last_tokens)
        source, sink = _present(flight.prefill), _present(flight.decode)
        now = self.loop.now
        flight.arrives_s = move(source.nic, sink.nic, tokens * per_token, first_ready_s, now, last * per_token)
        sink.pull_bytes_per_s = min(source.nic.bytes_per_s, sink.nic.bytes_per_s)
        flight.sent_tokens = flight.moved_tokens

    def _adopt(self, flight: Flight) -> None:
        decode, prefill = flight.decode, flight.prefill
        if decode is None or prefill is None or not decode.engine.alive or flight.outcome.finished:
            return
        if prefill.flights.pop(flight.outcome.number, None) is not None:
            prefill.engine.give_back(_present(flight.prefill_job))
        self.cluster.computed(decode.key, flight.decode_leg)
        if not flight.outcome.moves:
            actual_ms = (self.loop.now - flight.outcome.first_token_s) * 1e3
            predicted_ms = flight.estimates["uncorrected_handoff_ms"]
            self.cluster.learned_handoff(decode.key, predicted_ms, actual_ms, self.loop.now)
        decode.engine.adopt(_present(flight.decode_job), flight.outcome.first_token_s)

    def _answered(self, engine: LeapWorker, job: Job) -> None:
        flight: Flight = job.flight
        o = flight.outcome
        if job.hand_over:  # its first token was its last
            o.finished_s = self.loop.now
            self._answer_tokens.observe(1)
            self._end(flight)
            return
        o.finished_s = self.loop.now
        if job.gaps_since is not None:
            o.worst_gap_ms = engine.gaps.worst_ms(job.gaps_since, job.extra_gaps_ms)
            if o.split:
                o.handoff_gap_ms = job.extra_gaps_ms[0]
        self._learn_itl(flight, self.workers[engine.index])
        self._answer_tokens.observe(o.output_tokens)
        self._leave(flight, self.workers[engine.index])
        self._end(flight)

    @staticmethod
    def _forget_reservation(flight: Flight, decode: FastWorker) -> None:
        if flight.reserved and flight.decode_job is not None:
            decode.engine.give_back(flight.decode_job)
        elif not flight.reserved:
            decode.held_tokens -= flight.request.prompt_tokens
            decode.no_room = [f for f in decode.no_room if f is not flight]

    def _leave(self, flight: Flight, decode: FastWorker) -> None:
        decode.flights.pop(flight.outcome.number, None)
        self.cluster.ended(decode.key, flight.decode_leg)

    def _end(self, flight: Flight) -> None:
        self._live -= 1
        self._ended += 1
        if self._on_done is not None and self._ended % 256 == 0:
            self._on_done(self._ended)

    # Faults.

    def _crash(self, index: int) -> None:
        """The router sees the stream break; requests move, from prompt and what was emitted."""
        worker = self.workers[index]
        worker.engine.crash()
        self.cluster.lost(worker.key)
        flights, worker.flights = list(worker.flights.values()), {}
        worker.no_room.clear()
        worker.held_tokens = 0
        for flight in flights:
            self._moved(flight, worker)

    def _moved(self, flight: Flight, lost: FastWorker) -> None:
        o = flight.outcome
        other = flight.prefill if lost is flight.decode else flight.decode
        job = flight.prefill_job if lost is flight.decode else flight.decode_job
        if other is not None and other.engine.alive and other.flights.pop(o.number, None) is not None:
            leg = flight.prefill_leg if lost is flight.decode else flight.decode_leg
            self.cluster.ended(other.key, leg)
            other.no_room = [f for f in other.no_room if f is not flight]
            if other is flight.decode and flight.prefill is not None and not (job is not None and job.running):
                self._forget_reservation(flight, other)
            elif job is not None:
                other.engine.cancel(job)
        o.moves += 1
        if o.moves >= _MAX_MOVES:
            self._end(flight)
            return
        done = 0
        for j in (flight.decode_job, flight.prefill_job):
            done = max(done, j.emitted if j is not None else 0)
        again = Flight(flight.request, o, flight.names, exclude=flight.exclude | {lost.key})
        if done:
            again.request = TraceRequest(
                flight.request.arrival_s,
                flight.request.prompt_tokens + done,
                max(1, flight.request.output_tokens - done),
                flight.request.blocks,
            )
        self.loop.at(self.loop.now, self._dispatch, again)

    # What the router hears.

    def _report(self, slot: int) -> None:
        for index in range(slot, len(self.workers), REPORT_SLOTS):
            worker = self.workers[index]
            engine, cache = worker.engine, worker.engine.cache
            if not engine.alive:
                continue
            engine.settle()
            stored, removed = cache.take_events()
            prefixes = self.cluster.prefixes
            if removed:
                prefixes.removed(worker.key, removed)
            for parent, names in runs(stored):
                prefixes.stored(worker.key, names, parent)
            load = Load(
                engine.running,
                len(engine.waiting),
                engine.backlog_tokens(),
                engine.context_tokens,
                cache.capacity_tokens // BLOCK_TOKENS,
                cache.free_tokens // BLOCK_TOKENS,
                0,
                engine.step_ms,
                engine.prefill_tokens_per_s,
                engine.decode_tokens_per_s,
                worker.pull_bytes_per_s,
                engine.decode_step_ms,
                engine.chunk_tokens(),
                (engine.waiting_tokens() + worker.held_tokens) // BLOCK_TOKENS,
                worker.newest_leg,
                *(self._learned_step if engine.prefill_tokens_per_s else ()),
            )
            if load != worker.said:  # as workers do: no news, no message
                worker.said = load
                self.cluster.reported(worker.key, load, self.loop.now)
        if self._coming or self._live:
            self.loop.at(self.loop.now + self.spec.report_every_s, self._report, slot)

    def _sample(self, _: object) -> None:
        busy = [w.engine.busy_s for w in self.workers]
        gained = [(b - a) / self._sample_every_s for a, b in zip(self._last_busy, busy, strict=True)]
        self._last_busy = busy
        of = {
            role: [g for g, w in zip(gained, self.workers, strict=True) if w.role is role]
            for role in (Role.PREFILL, Role.DECODE)
        }
        decodes = [w.engine for w in self.workers if w.role is Role.DECODE]
        self.samples.append(
            Sample(
                self.loop.now,
                _mean(of[Role.PREFILL]),
                _mean(of[Role.DECODE]),
                sum(e.running for e in decodes),
                sum(w.engine.backlog_tokens() for w in self.workers),
                _mean([1 - e.cache.free_tokens / e.cache.capacity_tokens for e in decodes]),
            )
        )
        if self._coming or self._live:
            self.loop.at(self.loop.now + self._sample_every_s, self._sample)


def policy_params(spec: ClusterSpec, other: Mapping[str, float | bool]) -> PolicyParams:
    return PolicyParams(
        itl_target_ms=spec.itl_target_ms,
        ttft_target_ms=spec.ttft_base_s * 1e3,
        ttft_target_stretch=spec.ttft_isolated_factor,
        due_dates=spec.overload == "put_back",
        **other,  # type: ignore[arg-type]
    )


def runs(stored: Mapping[int, int]) -> list[tuple[int, list[int]]]:
    """(parent, names that follow it and one another), as block events have it."""
    found: list[tuple[int, list[int]]] = []
    last = -1
    for name, parent in stored.items():
        if parent == last:
            found[-1][1].append(name)
        else:
            found.append((parent, [name]))
        last = name
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _present(value: Any) -> Any:
    assert value is not None
    return value
