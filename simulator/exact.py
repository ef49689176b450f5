"""A cluster of real engine cores under the real dispatcher and life cycles, in virtual time; tens of workers.

Real: router.Dispatcher (decisions, lives, recoveries, promises, prefix index) and engine.EngineCore (scheduler, block
pool, prefix cache). Modelled: what a step takes (the cost model), the network (queues of NICs), messages (`router_ms`).
A handoff is told in events rather than spoken: blocks are announced after every step, room is reserved at the first
announcement, KV is queued on both NICs, and adoption follows the last byte.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.types import SamplingParams, SequenceSpec
from router.config import RouterConfig
from router.errors import Code, RequestRefused
from router.placement.cluster import Role
from router.placement.policy import Placement, WorkerKey
from router.record.tracing import RequestTrace
from router.request import LegStart, Request, Sampling
from simulator.cost_model import CostModel
from simulator.exact_router import Client, NoTokenizer, SimulatedDispatcher
from simulator.exact_worker import TOKEN, ExactWorker, Leg
from simulator.flights import BLOCK_TOKENS, REPORT_SLOTS, policy_params, runs
from simulator.loop import EventLoop
from simulator.network import move
from simulator.outcome import Outcome
from simulator.policies import Policy
from simulator.spec import ClusterSpec
from simulator.traces import Trace, TraceRequest

_DEADLINE_S = 1e6
_ROOM_TRY_S = 0.01
_ROOM_WAIT_S = 5.0


@dataclass(slots=True, eq=False)
class Handoff:
    """KV on its way. Broken when the reader stopped waiting for it."""

    source: Leg | None = None
    reader: Leg | None = None
    computed_tokens: int = 0
    final: bool = False
    reserved: bool = False
    sent_tokens: int = 0
    arrives_s: float = 0.0
    room_deadline_s: float = 0.0
    adopting: bool = False


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
            overload_protect=spec.overload_protect,
        )
        rng = random.Random(f"{seed}/router")
        tokenizer: Any = NoTokenizer()
        self.dispatcher = SimulatedDispatcher(config, tokenizer, self, rng, lambda: self.loop.now, self._call_later)
        self.dispatcher.close()  # nothing is tokenized
        self.dispatcher.params = policy_params(spec, {})
        self.dispatcher.policy = policy
        self.dispatcher.policy_rng = random.Random(f"{seed}/policy")
        self.workers = [
            ExactWorker(
                WorkerKey(f"{role.value[0]}{i}", 1), role, pool, spec, costs, self.loop, self.dispatcher,
                self._announced, self._handed_over,
            )
            for role, pool in ((Role.DECODE, spec.decode), (Role.PREFILL, spec.prefill))
            for i in range(pool.workers)
        ]  # fmt: skip
        self._by_key = {w.key: w for w in self.workers}
        for worker in self.workers:
            self.dispatcher.cluster.registered(worker.info, 0.0, leaving=False)
            self.dispatcher.cluster.connected(worker.key, 0.0)
        self._crashes = crashes
        self._handoffs: dict[str, Handoff] = {}
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
        client = Client(outcome, self.loop, self._request_over, self._index_of)
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
        load = worker.load()
        if load != worker.said:  # as workers do: no news, no message
            worker.said = load
            self.dispatcher.cluster.reported(worker.key, load, self.loop.now)

    # What the router asks of workers.

    def start(self, worker: WorkerKey, start: LegStart, deadline_s: float) -> None:
        w = self._by_key[worker]
        leg = w.legs[start.leg] = Leg(start, w)
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
                put_back_weight=start.put_back_weight,
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

    def _refused(self, leg: Leg, reason: str) -> None:
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

    def _stop_reading(self, leg: Leg) -> int:
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

    def serve(self, worker: WorkerKey, leg: int, handoff_id: str, most_tokens: int) -> None:
        raise AssertionError("nothing that runs is moved here")

    def freeze(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        raise AssertionError("nothing that runs is moved here")

    def keep(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        raise AssertionError("nothing that runs is moved here")

    def resync_blocks(self, worker: WorkerKey) -> None:
        raise AssertionError("no block event is lost here")

    # Handoffs.

    def _handoff(self, handoff_id: str) -> Handoff:
        return self._handoffs.setdefault(handoff_id, Handoff())

    def _announced(self, source: Leg, num_tokens: int) -> None:
        handoff = self._handoff(source.start.serve_handoff_id)
        handoff.computed_tokens = num_tokens - num_tokens % BLOCK_TOKENS
        self._pull(handoff)

    def _handed_over(self, source: Leg) -> None:
        handoff = self._handoff(source.start.serve_handoff_id)
        handoff.computed_tokens, handoff.final = source.known_tokens, True
        self._pull(handoff)

    def _pull(self, handoff: Handoff) -> None:
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

    def _wait_for_room(self, handoff: Handoff) -> None:
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

    def _adopt(self, what: tuple[Handoff, Leg]) -> None:
        handoff, reader = what
        source = handoff.source
        if handoff.reader is not reader or source is None or not reader.worker.alive or not source.worker.alive:
            return
        assert reader.start.pull is not None
        sink, emitted = reader.worker, [TOKEN]
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
