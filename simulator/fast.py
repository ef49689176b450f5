"""A cluster of leap workers under the router's cluster view, prefix index and decide().

    arrival ─ router_ms ─> prefix index ─> policy ─> legs, promises
      local   D.add ──────────────────> first token ──> answer
      split   P.add(hand_over) ─ chunks ─> room at D, then KV over both NICs ─┐
                               └ first token ──────> client                   ├─> D.adopt ──> answer
                                                      all bytes + handoff_ms ─┘

The router hears of loads and of cached blocks every `report_every_s` only; in between it knows its own promises.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence

from router.admission import AnswerLength
from router.placement.cluster import Cluster, Promise, Role, WorkerInfo
from router.placement.lots import lot_of
from router.placement.policy import Rejection, RequestFacts, WorkerKey
from simulator.cost_model import CostModel
from simulator.flights import BLOCK_TOKENS, MAX_TOKENS, FastWorker, Flight, Sample, policy_params
from simulator.handoffs import Handoffs
from simulator.jobs import Job
from simulator.leap_worker import LeapWorker, WorkerLimits
from simulator.learned import LeapEstimate, learned_steps, prompt_rate
from simulator.loop import EventLoop
from simulator.network import Nic
from simulator.outcome import Outcome
from simulator.policies import Policy
from simulator.prefix_cache import PrefixCache
from simulator.reports import Reports
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, TraceRequest

_MAX_MOVES = 4
_MIN_ITL_STEPS = 6  # as router/dispatcher.py


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
        self._secret = f"{random.Random(f'{seed}/router').getrandbits(64):016x}"  # as the exact cluster's dispatcher
        self.cluster = Cluster()
        self.params = policy_params(spec, params or {})
        self._sample_every_s = sample_every_s
        self._crashes = crashes
        self._legs = 0
        self._jobs = 0
        self._live = 0
        self._isolated: dict[int, float] = {}
        self._answer_tokens = AnswerLength()
        self.workers: list[FastWorker] = []
        self.handoffs = Handoffs(self.loop, spec, costs, self.cluster, self.workers)
        for role, pool in ((Role.DECODE, spec.decode), (Role.PREFILL, spec.prefill)):
            for i in range(pool.workers):
                self.workers.append(self._worker(f"{role.value[0]}{i}", role, pool))
        self.reports = Reports(self.loop, self.cluster, self.workers, spec.report_every_s, self._going)
        self._by_key = {w.key: w for w in self.workers}

    def _worker(self, name: str, role: Role, pool: PoolSpec) -> FastWorker:
        spec, costs = self.spec, self.spec.costs_of(pool, self.costs)
        capacity = spec.kv_capacity_tokens or costs.kv_capacity_tokens
        limits = WorkerLimits(
            pool.max_batch_tokens,
            min(pool.max_running_sequences, pool.max_batch_tokens),
            spec.itl_target_ms if pool.adaptive_chunks else None,
            due_dates=spec.overload == "put_back",
        )
        key = WorkerKey(name, 1)
        info = WorkerInfo(
            key, role, name, "simulated", "simulated", BLOCK_TOKENS, BLOCK_TOKENS * costs.kv_bytes_per_token,
            capacity // BLOCK_TOKENS, 1 << 20, 1 << 17, device=costs.name,
        )  # fmt: skip
        self.cluster.registered(info, 0.0, leaving=False)
        self.cluster.connected(key, 0.0)
        learned = LeapEstimate(learned_steps(costs.step, pool.max_batch_tokens, decodes=role is Role.DECODE))
        engine = LeapWorker(
            self.loop, len(self.workers), costs.step, learned, limits, PrefixCache(capacity, BLOCK_TOKENS),
            self._first_token, self.handoffs.chunk, self._answered, self.handoffs.room,
        )  # fmt: skip
        engine.prefill_tokens_per_s = prompt_rate(costs.step, pool.max_batch_tokens)
        return FastWorker(key, role, engine, Nic((pool.nic_gbytes_per_s or spec.nic_gbytes_per_s) * 1e9))

    @property
    def samples(self) -> list[Sample]:
        return self.reports.samples

    def _going(self) -> bool:
        return self._coming or self._live > 0

    # A run.

    def run(self, trace: Trace, on_done: Callable[[int], None] | None = None) -> list[Outcome]:
        """Outcomes in the order of arrival. `on_done(number of requests ended)` is called now and then."""
        outcomes: list[Outcome] = []
        self._trace = iter(trace.requests)
        self._outcomes = outcomes
        self._on_done = on_done
        self._ended = 0
        self._coming = True
        for worker in self.workers:
            worker.engine.cache.block_tokens = trace.block_tokens
        self._next_arrival()
        self._start_reports()
        for at_s, index in self._crashes:
            self.loop.at(at_s, self._crash, index)
        # A run makes millions of objects that stay and, flights being taken apart as they end, hardly a circle among
        # them: looking through them again and again took 7 to 12 %.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self.loop.run()
        finally:
            if collecting:
                gc.enable()
        return outcomes

    def _start_reports(self) -> None:
        self.reports.start(self._sample_every_s)

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
            lot=lot_of(f"r{o.number}", self._secret),
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
        due = now + estimates.get("due_ms", 0.0) / 1e3, estimates.get("put_back_weight", 1.0)
        flight.decode_leg = self._new_leg(decode)
        decode.flights[o.number] = flight
        flight.decode_job = self._job(flight, due)
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
        flight.prefill_job = self._job(flight, due, hand_over=True)
        prefill.engine.add(flight.prefill_job)

    def _new_leg(self, worker: FastWorker) -> int:
        self._legs += 1
        worker.newest_leg = self._legs
        return self._legs

    def _job(self, flight: Flight, due: tuple[float, float], *, hand_over: bool = False) -> Job:
        self._jobs += 1
        r = flight.request
        return Job(self._jobs, flight, r.prompt_tokens, r.output_tokens, flight.names, hand_over, *due)

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
            self.handoffs.forget_reservation(flight, decode)
            return
        self.handoffs.computed(flight)

    def _learn_ttft(self, flight: Flight) -> None:
        """What the router learns from its own estimates, as Dispatcher does."""
        o, computing = flight.outcome, flight.prefill or flight.decode
        if o.moves or computing is None:
            return
        actual_ms = (self.loop.now - o.arrival_s) * 1e3 - self.spec.router_ms
        e = flight.estimates
        self.cluster.learned_ttft(computing.key, e["uncorrected_ttft_ms"], actual_ms, self.loop.now, e["backlog_ms"])

    def _learn_itl(self, flight: Flight, decode: FastWorker, second_token_s: float) -> None:
        o, e = flight.outcome, flight.estimates
        steps = o.output_tokens - 2
        if o.moves or steps < _MIN_ITL_STEPS:
            return
        actual_ms = (o.finished_s - second_token_s) * 1e3 / steps
        self.cluster.learned_itl(decode.key, e["uncorrected_itl_ms"], actual_ms, self.loop.now)

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
        self._learn_itl(flight, self.workers[engine.index], job.second_token_s)
        self._answer_tokens.observe(o.output_tokens)
        self._leave(flight, self.workers[engine.index])
        self._end(flight)

    def _leave(self, flight: Flight, decode: FastWorker) -> None:
        decode.flights.pop(flight.outcome.number, None)
        self.cluster.ended(decode.key, flight.decode_leg)

    def _end(self, flight: Flight) -> None:
        flight.decode_job = flight.prefill_job = None  # which point back: nothing is left for the garbage collector
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
                self.handoffs.forget_reservation(flight, other)
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
