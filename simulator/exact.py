"""A cluster of real engine cores under the real dispatcher and life cycles, in virtual time; tens of workers.

Real: router.Dispatcher (decisions, lives, recoveries, promises, prefix index) and engine.EngineCore (scheduler, block
pool, prefix cache). Modelled: what a step takes (the cost model), the network (queues of NICs), messages (`router_ms`).
A handoff is told in events rather than spoken: blocks are announced after every step, room is reserved at the first
announcement, KV is queued on both NICs, and adoption follows the last byte.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from engine.step_cost import shape_of
from engine.types import SamplingParams, SequenceSpec, StepPlan, StepResult
from router.cluster import Role, WorkerInfo
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.errors import Code, Failure, RequestRefused
from router.lifecycle import Finish, LegStart, Life, Request, Sampling
from router.policy import Placement, Rejection, RequestFacts, Route, WorkerKey
from router.tracing import RequestTrace
from simulator.cost_model import CostModel, StepCost
from simulator.fast import BLOCK_TOKENS, MAX_TOKENS, REPORT_SLOTS, Load, policy_params, runs
from simulator.gaps import worst_ms
from simulator.loop import EventLoop
from simulator.network import Nic, move
from simulator.outcome import Outcome
from simulator.policies import Policy
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, TraceRequest
from worker.rates import StepRates

_VOCABULARY = 1 << 18
_TOKEN = 7  # what every step samples
_DEADLINE_S = 1e6
_ROOM_TRY_S = 0.01
_ROOM_WAIT_S = 5.0


def step_ms(cost: StepCost, plan: StepPlan) -> float:
    """What the cost model says of a plan of the real scheduler."""
    shape = shape_of(plan.items)
    return cost.ms(shape.sequences, shape.tokens, shape.context_tokens, shape.attention_pairs)


@dataclass(slots=True, eq=False)
class _Leg:
    start: LegStart
    worker: ExactWorker

    @property
    def number(self) -> int:
        return self.start.leg

    @property
    def known_tokens(self) -> int:
        return len(self.start.request.prompt) + len(self.start.emitted)


@dataclass(slots=True, eq=False)
class _Handoff:
    """KV on its way. Broken when the reader stopped waiting for it."""

    source: _Leg | None = None
    reader: _Leg | None = None
    computed_tokens: int = 0
    final: bool = False
    reserved: bool = False
    sent_tokens: int = 0
    arrives_s: float = 0.0
    room_deadline_s: float = 0.0
    adopting: bool = False


class _Text:
    """No text is made: tokens are numbers here."""

    stopped = False

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class _Tokenizer:
    name = "simulated"
    vocab_size = _VOCABULARY
    context_limit_tokens = 1 << 20
    eos_token_ids: frozenset[int] = frozenset()
    longest_token_chars = 1
    chat_template_text = ""

    def special_ids(self, markers: Sequence[str]) -> dict[str, int]:
        return {}

    def build_llguidance(self) -> Any:
        raise AssertionError("no request has a format")


class _Dispatcher(Dispatcher):
    policy: Policy
    policy_rng: random.Random

    def _new_text(self, request: Request) -> Any:
        return _Text()

    def decide(self, facts: RequestFacts) -> Route | Rejection:
        # How long the answer will be is in the trace, and nobody's to know.
        expected = self.answer_tokens.expected(MAX_TOKENS)
        facts = replace(facts, max_tokens=MAX_TOKENS, expected_tokens=expected, time_left_s=math.inf)
        return self.policy.place(facts, self.cluster.view(), self.params, self._clock(), self.policy_rng)


@dataclass(slots=True, eq=False)
class _Client:
    """Keeps the times that a client would see."""

    outcome: Outcome
    loop: EventLoop
    ended: Callable[[], None]
    index_of: Callable[[WorkerKey], int]
    last_s: float = 0.0
    gaps_ms: list[float] = field(default_factory=list)

    def started(self, life: Life) -> None:
        o, route = self.outcome, life.route
        o.rule, o.split, o.decode = route.rule, route.split, self.index_of(route.decode)
        o.prefill = -1 if route.prefill is None else self.index_of(route.prefill)
        o.predicted_ttft_ms = route.estimates["ttft_ms"]

    def token(self, position: int, token_id: int, text: str, logprobs: object | None) -> None:
        now = self.loop.now
        if position == 0:
            self.outcome.first_token_s = now
        else:
            self.gaps_ms.append((now - self.last_s) * 1e3)
        self.last_s = now

    def finished(self, life: Life, reason: Finish) -> None:
        o = self.outcome
        o.finished_s = self.last_s
        o.worst_gap_ms = worst_ms(self.gaps_ms)
        o.cached_tokens, o.moves = life.cached_tokens, life.recoveries
        if o.split and self.gaps_ms:
            o.handoff_gap_ms = self.gaps_ms[0]
        self.ended()

    def failed(self, life: Life, failure: Failure) -> None:
        self.outcome.refused = True
        self.ended()

    def wake(self) -> None:
        pass


class ExactWorker:
    """The step loop of worker/loop.py in virtual time: schedule, the step's time, commit, and on."""

    def __init__(self, cluster: ExactCluster, key: WorkerKey, role: Role, pool: PoolSpec) -> None:
        self.cluster, self.key, self.role = cluster, key, role
        spec, costs = cluster.spec, cluster.costs
        blocks = (spec.kv_capacity_tokens or costs.kv_capacity_tokens) // BLOCK_TOKENS
        limits = EngineLimits(
            BLOCK_TOKENS,
            pool.max_batch_tokens,
            min(pool.max_running_sequences, pool.max_batch_tokens),
            1 << 20,
            1 << 20,
            _VOCABULARY,
            spec.itl_target_ms if pool.adaptive_chunks else None,
        )
        self.core = EngineCore(limits, BlockPool(blocks), "simulated")
        self.nic = Nic(spec.nic_gbytes_per_s * 1e9)
        self.legs: dict[int, _Leg] = {}
        self.alive = True
        self.busy_s = 0.0
        self.rates = StepRates()
        self.pull_bytes_per_s = 0.0
        self._stepping = False
        self.block_events = 0
        self.newest_leg = 0

    @property
    def info(self) -> WorkerInfo:
        bytes_per_block = BLOCK_TOKENS * self.cluster.costs.kv_bytes_per_token
        return WorkerInfo(
            self.key, self.role, self.key.worker_id, "simulated", "simulated", BLOCK_TOKENS, bytes_per_block,
            self.core.pool.num_blocks, 1 << 20, _VOCABULARY,
        )  # fmt: skip

    def turn(self) -> None:
        if self._stepping or not self.alive:
            return
        plan = self.core.schedule(self.cluster.loop.now)
        if plan is None:
            return
        self._stepping = True
        ms = step_ms(self.cluster.costs.step, plan)
        self.busy_s += ms / 1e3
        self.cluster.loop.at(self.cluster.loop.now + ms / 1e3, self._commit, (plan, ms))

    def _commit(self, what: tuple[StepPlan, float]) -> None:
        plan, ms = what
        self._stepping = False
        self.rates.observe(plan, ms / 1e3)
        if not self.alive:
            return
        cluster, now = self.cluster, self.cluster.loop.now
        sampled = tuple(_TOKEN if item.sample else None for item in plan.items)
        events = self.core.commit(plan, StepResult(sampled, (None,) * len(sampled)), now)
        for progress in events.progress:
            leg = self.legs.get(progress.sequence_id)
            if leg is not None and leg.start.serve_handoff_id:
                cluster.announced(leg, progress.num_computed_tokens)
        if events.tokens:
            cluster.dispatcher.on_tokens(
                [t.sequence_id for t in events.tokens],
                [t.position for t in events.tokens],
                [t.token_id for t in events.tokens],
                {},
            )
        for end in events.ends:
            leg = self.legs.get(end.sequence_id)
            if leg is None:
                continue
            if end.reason is None:
                cluster.handed_over(leg)
                cluster.dispatcher.on_end(leg.number, None, end.cached_tokens)
                continue
            del self.legs[leg.number]
            if leg.start.serve_handoff_id:  # retained, and nobody will read it
                self.core.drop(leg.number)
            cluster.dispatcher.on_end(leg.number, Finish(end.reason.value), end.cached_tokens)
        cluster.dispatcher.flush()
        self.turn()

    def load(self) -> Load:
        load, cost = self.core.load(), self.core.step_cost.cost()
        return Load(
            load.running_sequences,
            load.waiting_sequences,
            load.prefill_backlog_tokens,
            load.context_tokens,
            load.total_blocks,
            load.free_blocks,
            load.cached_blocks,
            self.rates.step_ms,
            self.rates.prefill_tokens_per_s,
            self.rates.decode_tokens_per_s,
            self.pull_bytes_per_s,
            self.rates.decode_step_ms,
            load.chunk_tokens,
            load.waiting_blocks,
            self.newest_leg,
            cost.constant_ms,
            cost.per_sequence_ms,
            cost.per_token_ms,
            cost.per_context_token_ms,
            cost.per_attention_pair_ms,
            self.core.step_cost.relative_error,
        )


class ExactCluster:
    """One run; `crashes` as in FastCluster. It is also the dispatcher's Sender."""

    def __init__(
        self,
        spec: ClusterSpec,
        costs: CostModel,
        policy: Policy,
        seed: int,
        *,
        crashes: Sequence[tuple[float, int]] = (),
    ) -> None:
        self.spec, self.costs = spec, costs
        self.loop = EventLoop()
        config = RouterConfig(
            itl_target_ms=spec.itl_target_ms,
            max_live_requests=1 << 30,
            max_deadline_s=_DEADLINE_S,
            default_deadline_s=_DEADLINE_S,
            max_backlog_s=_DEADLINE_S,
        )
        rng = random.Random(f"{seed}/router")
        tokenizer: Any = _Tokenizer()
        self.dispatcher = _Dispatcher(config, tokenizer, self, rng, lambda: self.loop.now, self._call_later)
        self.dispatcher.close()  # nothing is tokenized
        self.dispatcher.params = policy_params(spec, {})
        self.dispatcher.policy = policy
        self.dispatcher.policy_rng = random.Random(f"{seed}/policy")
        self.workers = [
            ExactWorker(self, WorkerKey(f"d{i}", 1), Role.DECODE, spec.decode) for i in range(spec.decode.workers)
        ]
        self.workers += [
            ExactWorker(self, WorkerKey(f"p{i}", 1), Role.PREFILL, spec.prefill) for i in range(spec.prefill.workers)
        ]
        self._by_key = {w.key: w for w in self.workers}
        for worker in self.workers:
            self.dispatcher.cluster.registered(worker.info, 0.0, leaving=False)
            self.dispatcher.cluster.connected(worker.key, 0.0)
        self._crashes = crashes
        self._handoffs: dict[str, _Handoff] = {}
        self._live = 0
        self._isolated: dict[int, float] = {}

    def _call_later(self, delay_s: float, call: Callable[[], None]) -> Any:
        return self.loop.at(self.loop.now + delay_s, lambda _: call())

    # A run.

    def run(self, trace: Trace, on_done: Callable[[int], None] | None = None) -> list[Outcome]:
        self._trace, self._block_tokens = iter(trace.requests), trace.block_tokens
        self._outcomes: list[Outcome] = []
        self._on_done, self._ended = on_done, 0
        self._coming = True
        self._next_arrival()
        for slot in range(min(REPORT_SLOTS, len(self.workers))):
            self.loop.at(slot * self.spec.report_every_s / REPORT_SLOTS, self._report, slot)
        for at_s, index in self._crashes:
            self.loop.at(at_s, self._crash, index)
        self.loop.run()
        return self._outcomes

    def _next_arrival(self) -> None:
        request = next(self._trace, None)
        if request is None:
            self._coming = False
        else:
            self.loop.at(request.arrival_s, self._arrive, request)

    def isolated_s(self, prompt_tokens: int) -> float:
        known = self._isolated.get(prompt_tokens)
        if known is None:
            chunk = max(self.spec.prefill.max_batch_tokens, 8192)
            known = self._isolated[prompt_tokens] = self.costs.step.prompt_ms(prompt_tokens, chunk) / 1e3
        return known

    def _arrive(self, request: TraceRequest) -> None:
        target = self.spec.ttft_base_s + self.spec.ttft_isolated_factor * self.isolated_s(request.prompt_tokens)
        outcome = Outcome(len(self._outcomes), request.arrival_s, request.prompt_tokens, request.output_tokens, target)
        self._outcomes.append(outcome)
        self._live += 1
        self.loop.at(self.loop.now + self.spec.router_ms / 1e3, self._dispatch, (request, outcome))
        self._next_arrival()

    def _dispatch(self, what: tuple[TraceRequest, Outcome]) -> None:
        trace_request, outcome = what
        now = self.loop.now
        request = Request(
            f"r{outcome.number}",
            tokens_of(trace_request, self._block_tokens, outcome.number),
            Sampling(max_tokens=trace_request.output_tokens),
            arrived=outcome.arrival_s,
            deadline=now + _DEADLINE_S,
        )
        client = _Client(outcome, self.loop, self._request_over, self._index_of)
        try:
            self.dispatcher.dispatch(request, Placement.AUTO, client, RequestTrace(request.request_id, None))
        except RequestRefused:
            outcome.refused = True
            self._request_over()

    def _index_of(self, key: WorkerKey) -> int:
        return self.workers.index(self._by_key[key])

    def _request_over(self) -> None:
        self._live -= 1
        self._ended += 1
        if self._on_done is not None:
            self._on_done(self._ended)

    def _report(self, slot: int) -> None:
        for index in range(slot, len(self.workers), REPORT_SLOTS):
            if self.workers[index].alive:
                self._report_of(self.workers[index])
        if self._coming or self._live:
            self.loop.at(self.loop.now + self.spec.report_every_s, self._report, slot)

    def _report_of(self, worker: ExactWorker) -> None:
        events = worker.core.take_block_events()
        changes: list[tuple[str, Any]] = []
        if events.removed:
            changes.append(("removed", events.removed))
        if events.stored:
            changes.append(("stored", runs(dict(events.stored))))
        if changes:
            self.dispatcher.cluster.block_events(worker.key, worker.block_events, changes)
            worker.block_events += len(changes)
        self.dispatcher.cluster.reported(worker.key, worker.load(), self.loop.now)

    # What the router asks of workers.

    def start(self, worker: WorkerKey, start: LegStart, deadline_s: float) -> None:
        w = self._by_key[worker]
        leg = w.legs[start.leg] = _Leg(start, w)
        w.newest_leg = start.leg
        r = start.request
        if start.serve_handoff_id:
            self._handoff(start.serve_handoff_id).source = leg
        if start.pull is not None:
            handoff = self._handoff(start.pull[0])
            handoff.reader, handoff.reserved, handoff.adopting = leg, False, False
        refusal = w.core.add(
            SequenceSpec(
                start.leg,
                r.prompt,
                SamplingParams(max_tokens=r.sampling.max_tokens),
                start.emitted,
                due_s=start.due_ms / 1e3 if start.due_ms is not None else None,
                hold=start.pull is not None,
                hand_over=bool(start.serve_handoff_id),
                retain=bool(start.serve_handoff_id),
            ),
            self.loop.now,
        )
        # The dispatcher must not be called back from inside its own call.
        if refusal is not None:
            self._soon(lambda: self._refused(leg, refusal.reason))
        elif start.pull is None:
            self._soon(w.turn)
        else:
            pulled = self._handoff(start.pull[0])
            self._soon(lambda: self._pull(pulled))  # what was announced to another reader stands

    def _soon(self, call: Callable[[], None]) -> None:
        self.loop.at(self.loop.now, lambda _: call())

    def _refused(self, leg: _Leg, reason: str) -> None:
        leg.worker.legs.pop(leg.number, None)
        self.dispatcher.on_error(leg.number, Code.RESOURCE_EXHAUSTED, reason)
        self.dispatcher.flush()

    def cancel(self, worker: WorkerKey, leg: int, reason: str, keep_lease: bool) -> None:
        w = self._by_key[worker]
        found = w.legs.pop(leg, None)
        if found is not None and w.alive:
            self._stop_reading(found)
            w.core.cancel(leg)
            self._soon(w.turn)

    def _stop_reading(self, leg: _Leg) -> int:
        """Returns the tokens whose KV has been sent."""
        if leg.start.pull is None:
            return 0
        handoff = self._handoff(leg.start.pull[0])
        if handoff.reader is not leg:
            return 0
        handoff.reader = None
        return handoff.sent_tokens if handoff.reserved else 0

    def continue_locally(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None:
        w = self._by_key[worker]
        found = w.legs.get(leg)
        if found is not None and w.alive:
            kept = self._stop_reading(found)
            w.core.continue_locally(leg, kept, emitted[len(found.start.emitted) :], self.loop.now)
            self._soon(w.turn)

    def follow(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...], pull: tuple[str, WorkerKey]) -> None:
        """Another source takes over for a reader that waits."""
        w = self._by_key[worker]
        found = w.legs.get(leg)
        if found is None or not w.alive:
            return
        kept = self._stop_reading(found)
        w.core.hold_again(leg, kept, emitted[len(found.start.emitted) :], self.loop.now)
        found.start = replace(found.start, emitted=emitted, pull=pull)
        self._handoff(pull[0]).reader = found

    def resync_blocks(self, worker: WorkerKey) -> None:
        raise AssertionError("no block event is lost here")

    # Handoffs.

    def _handoff(self, handoff_id: str) -> _Handoff:
        return self._handoffs.setdefault(handoff_id, _Handoff())

    def announced(self, source: _Leg, num_tokens: int) -> None:
        handoff = self._handoff(source.start.serve_handoff_id)
        handoff.computed_tokens = num_tokens - num_tokens % BLOCK_TOKENS
        self._pull(handoff)

    def handed_over(self, source: _Leg) -> None:
        handoff = self._handoff(source.start.serve_handoff_id)
        handoff.computed_tokens, handoff.final = source.known_tokens, True
        self._pull(handoff)

    def _pull(self, handoff: _Handoff) -> None:
        """Queue what is announced and not sent yet; after the last of it, adopt."""
        source, reader, now = handoff.source, handoff.reader, self.loop.now
        if source is None or reader is None or not handoff.computed_tokens or handoff.adopting:
            return
        if not handoff.reserved:
            reservation = reader.worker.core.reserve(reader.number, reader.known_tokens, now)
            if reservation is None:
                self._wait_for_room(handoff)
                return
            handoff.reserved = True
            handoff.room_deadline_s = 0.0
            handoff.sent_tokens = min(reservation.cached_blocks * BLOCK_TOKENS, reader.known_tokens)
        tokens = handoff.computed_tokens - handoff.sent_tokens
        if tokens > 0:
            num_bytes = tokens * self.costs.kv_bytes_per_token
            sink = reader.worker
            handoff.arrives_s = move(source.worker.nic, sink.nic, num_bytes, now, now, num_bytes)
            handoff.sent_tokens = handoff.computed_tokens
            sink.pull_bytes_per_s = min(source.worker.nic.bytes_per_s, sink.nic.bytes_per_s)
        if handoff.final:
            handoff.adopting = True
            at = max(now, handoff.arrives_s) + self.spec.handoff_ms / 1e3
            self.loop.at(at, self._adopt, (handoff, reader))

    def _wait_for_room(self, handoff: _Handoff) -> None:
        now, reader = self.loop.now, handoff.reader
        assert reader is not None
        if not handoff.room_deadline_s:
            handoff.room_deadline_s = now + _ROOM_WAIT_S
        elif handoff.room_deadline_s <= now:
            handoff.room_deadline_s = 0.0
            assert reader.start.pull is not None
            self.dispatcher.on_handoff_failed(reader.number, reader.start.pull[0], "no_room", "", 0)
            self.dispatcher.flush()
            return
        self.loop.at(now + _ROOM_TRY_S, lambda _: self._pull(handoff) if handoff.reader is reader else None)

    def _adopt(self, what: tuple[_Handoff, _Leg]) -> None:
        handoff, reader = what
        source = handoff.source
        if handoff.reader is not reader or source is None or not reader.worker.alive or not source.worker.alive:
            return
        assert reader.start.pull is not None
        sink, emitted = reader.worker, [_TOKEN]
        if source.worker.legs.pop(source.number, None) is not None:
            source.worker.core.drop(source.number)
            source.worker.turn()
        self._handoffs.pop(reader.start.pull[0], None)
        position = len(reader.start.emitted)
        self.dispatcher.on_tokens([reader.number], [position], emitted, {})
        sink.core.adopt(reader.number, reader.known_tokens, emitted, self.loop.now)
        self.dispatcher.on_adopted(reader.number, reader.start.pull[0], 0.0, 0.0)
        self.dispatcher.flush()
        sink.turn()

    # Faults.

    def _crash(self, index: int) -> None:
        worker = self.workers[index]
        worker.alive = False
        worker.legs.clear()
        self.dispatcher.on_worker_lost(worker.key, "crashed")


def tokens_of(request: TraceRequest, block_tokens: int, number: int) -> list[int]:
    """Token ids with the prefixes that the trace says are shared, and a tail that no other request has."""
    tokens: list[int] = []
    for block in request.blocks:
        tokens += [block & 0xFFFF, 0x10000 + (block >> 16)]
        tokens += [1] * (block_tokens - 2)
    tail = request.prompt_tokens - len(tokens)
    if tail > 0:
        tokens += [0x20000 + (number & 0xFFFF), 0x30000 + (number >> 16)][:tail]
        tokens += [2] * (tail - 2)
    return tokens
