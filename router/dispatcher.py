"""Where requests, workers and decisions meet. Runs on the event loop; every call returns at once but `submit`.

submit: check -> tokenize (beside the loop) -> decide -> Life.start
worker messages -> Life.on_... -> effects on WorkerPorts and the client's buffer -> `flush` once per message
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from checkpoint.generation import SamplingDefaults
from grammar.structured import Structured
from router.access.gate import ANYBODY, Gate, Pass, scoped_id, scoped_salt
from router.access.other_routers import OtherRouters
from router.access.sleep import woken
from router.admission import (
    AnswerLength,
    RawRequest,
    ServedModel,
    admit,
    check_before_tokenizing,
    deadline_s,
    narrowed,
    tokenize,
    tokenized,
)
from router.beam_life import BeamLife, life_of
from router.breakdown import Breakdown, FirstStep
from router.config import RouterConfig
from router.errors import Code, Failure, RequestRefused, our_failure, refuse
from router.forks import COMPLETE, Forks
from router.legs import LegRole, RecoveryLimits, Text
from router.lifecycle import Life
from router.live import BufferedClient, CallLater, Live, Sender, failure_of, learn_early, learn_itl, log_end
from router.moves import Moves
from router.placement import crashes
from router.placement.adapters import Adapters
from router.placement.cluster import Cluster, Promise, Role, WorkerInfo
from router.placement.policy import (
    BESIDE,
    Placement,
    PolicyParams,
    Rejection,
    RequestFacts,
    Route,
    WorkerKey,
    decide,
)
from router.placement.revisions import Revisions
from router.planner import Planner
from router.record.counts import RouterCounts
from router.record.history import Explained, History, explain
from router.record.tracing import RequestTrace
from router.request import Finish, LegStart, Request
from router.retry import Crowd, RetryBudget
from router.sessions import Sessions
from router.suspects import Suspects
from router.text.stream import TextStream
from router.text.structured import StructuredChecker
from router.text.tokenizer import Tokenizer
from router.text.tools.families import FAMILIES, choose_family

_MAX_ASIDE = 32
_INLINE_TOKENIZE_BYTES = 4096  # below a millisecond: a hop to a thread costs as much
_RECENT = 64

log = logging.getLogger(__name__)

T = TypeVar("T")


class _Ports:
    """The dispatcher as a Life sees it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.start = dispatcher.start_leg
        self.cancel = dispatcher.cancel_leg
        self.continue_locally = dispatcher.continue_leg
        self.follow = dispatcher.follow_leg
        self.serve, self.freeze, self.keep = dispatcher.serve_leg, dispatcher.freeze_leg, dispatcher.keep_leg
        self.retry_later = dispatcher.retry_later
        self.computed = dispatcher.leg_computed
        self.ended = dispatcher.leg_ended


class Dispatcher:
    def __init__(
        self,
        config: RouterConfig,
        tokenizer: Tokenizer,
        sender: Sender,
        rng: random.Random,
        clock: Callable[[], float],
        call_later: CallLater,
        gate: Gate | None = None,
    ) -> None:
        self.config = config
        self.gate = gate or Gate()
        self.tokenizer = tokenizer
        self.cluster = Cluster(mixed=config.mixed_quantization)
        self.params = PolicyParams(
            itl_target_ms=config.itl_target_ms,
            max_local_stall_steps=config.max_local_stall_steps,
            max_backlog_s=config.max_backlog_s,
            ttft_target_ms=config.ttft_target_ms,
            ttft_target_stretch=config.ttft_target_stretch,
            hysteresis=config.hysteresis,
            pull_prefixes=config.pull_prefixes,
            due_dates=config.overload == "put_back",
            overload_protect=config.overload_protect,
        )
        self.model_name = config.served_model_name or tokenizer.name
        self._own_names = tuple(dict.fromkeys((self.model_name, *config.served_model_names)))
        self.adapters = Adapters(self.cluster, self._own_names)
        self.recent: deque[tuple[Life, float]] = deque(maxlen=_RECENT)  # newest first
        self.requests_total = self.errors_total = 0
        self.tokens_total = self.recoveries_total = 0
        self.counts = RouterCounts()
        self.on_ended: Callable[[Life], None] | None = None  # of metrics; hears of every request that was placed
        self.asleep: Callable[[], bool] = lambda: False  # scaled to zero, until a request comes
        self.leaving = False
        self._revisions = Revisions(self.cluster, self.model_name, rng, config.other_weights, self.adapters)
        self.answer_tokens = AnswerLength()
        self.others = OtherRouters(clock)
        self._sender = sender
        self._ports = _Ports(self)
        self._rng, self._clock, self._call_later = rng, clock, call_later
        self._handoff_prefix = secret = f"{rng.getrandbits(64):016x}"
        budget = RetryBudget(config.retry_share, config.retry_burst)
        self._planner = Planner(self.cluster, self.params, budget, self.decide, self._revisions, rng, clock, secret)
        self._leg_numbers = itertools.count(1)
        self._by_leg: dict[int, Live] = {}
        self._live: dict[str, Live] = {}
        self._admitting: set[str] = set()
        self._forks = Forks(self._live, self._planner, self.counts, self._tell, self.flush, call_later)
        self._suspects = Suspects(self._by_leg, self.cluster, self.counts, self._tell, clock)
        self._sessions = Sessions()
        self._history = History()
        self._crowd = Crowd()
        self._dirty: dict[int, Live] = {}
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside")
        self._aside_waiting = 0
        models_own = config.generation_config == "model"
        self.sampling_defaults = tokenizer.sampling_defaults if models_own else SamplingDefaults()
        self.tool_family = choose_family(config.tool_parser, tokenizer.chat_template_text)  # "" = calls are not read
        markers = FAMILIES[self.tool_family].markers if self.tool_family else ()
        self.tool_markers = tokenizer.special_ids(markers)  # those that are special tokens
        expected = self.answer_tokens.expected
        self.moves = Moves(
            self.cluster,
            self._by_leg,
            expected,
            self._moving,
            clock,
            call_later,
            unasked=config.migrate,
            balance=config.balance,
        )
        self._structured = StructuredChecker(tokenizer.build_llguidance)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._aside.shutdown(wait=False, cancel_futures=True)
        self._structured.close()

    @property
    def retries_total(self) -> int:
        return self._planner.budget.spent_total

    @property
    def live_requests(self) -> int:
        return len(self._live) + len(self._admitting)

    def served_model(self) -> ServedModel:
        """The tokenizer's view, narrowed by what the workers can do."""
        decode, prefill = ([e.info for e in self.cluster.ready(role)] for role in (Role.DECODE, Role.PREFILL))
        names = {"aliases": self._own_names, "adapters": self.adapters.digests(), "older": self.adapters.older()}
        return narrowed(self.tokenizer, decode, prefill, self.model_name, sampling=self.sampling_defaults, **names)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The model's own, and its adapters'."""
        return (*self._own_names, *self.adapters.digests())

    def shown_name(self, asked: str | None) -> str:
        """What an answer calls the model: as the request did."""
        return asked if asked in self.model_names else self.model_name

    # Requests.

    async def submit(
        self,
        raw: RawRequest,
        client: BufferedClient,
        *,
        grpc_deadline_s: float | None = None,
        trace_context: Mapping[str, str] | None = None,
    ) -> str:
        """Admit and dispatch. Returns what `cancel` takes. Raises RequestRefused before any work is done.

        The caller is the one that its door has found (router/access/gate.py).
        """
        try:
            return await self._submit(raw, client, grpc_deadline_s, trace_context)
        except Exception as error:
            failure = failure_of(error)
            self.counts.refused(failure.code)
            raise RequestRefused(failure) from error

    async def _submit(
        self,
        raw: RawRequest,
        client: BufferedClient,
        grpc_deadline_s: float | None,
        trace_context: Mapping[str, str] | None,
    ) -> str:
        now = self._clock()
        if self.leaving:
            raise refuse(Code.UNAVAILABLE, "this router is leaving; retry, another one answers", retry_after_ms=200)
        if self.live_requests >= self.config.max_live_requests:
            again_s = self._crowd.come_again_s(now)
            why = f"{self.live_requests} requests are live, which is this router's limit; retry in {again_s:.1f} s"
            raise refuse(Code.RESOURCE_EXHAUSTED, why, retry_after_ms=int(again_s * 1e3))
        model = self.served_model()
        check_before_tokenizing(raw, self.config, model)
        caller = self.gate.current()
        priority = self.gate.priority(caller, raw.priority)
        request_id = raw.request_id or f"{self._rng.getrandbits(64):016x}"
        key = scoped_id(caller.tenant, request_id)
        if key in self._live or key in self._admitting:
            why = f"request id {request_id!r} is live; choose another, or leave it empty"
            raise refuse(Code.ALREADY_EXISTS, why, field="request_id")
        way = self.gate.enter(caller, model.called(raw.model), now, again=raw.first is not None)
        self._admitting.add(key)
        trace = RequestTrace(request_id, trace_context)
        try:
            if self.asleep():
                await woken(self.asleep, now + deadline_s(raw, self.config, grpc_deadline_s), self._clock)
                model = self.served_model()
            if raw.sampling.structured is not None:
                await self._structured.check(raw.sampling.structured)
            raw, prompt = await self._tokenized(raw, model)
            left = way.tokens_left(now)
            request = admit(
                raw, prompt, self.config, model, now, grpc_deadline_s, request_id, self._rng, trace.traceparent, left
            )
            way.take_tokens(request.counted(request.sampling.max_tokens), now)
            request = replace(
                request, priority=priority, tenant=caller.tenant, cache_salt=scoped_salt(caller.tenant, raw.cache_salt)
            )
            self.dispatch(request, raw.placement, client, trace, way)
        except BaseException as error:
            if isinstance(error, RequestRefused):
                trace.refuse(error.failure)
            if key not in self._live:
                way.leave(0, self._clock())
            raise
        finally:
            self._admitting.discard(key)
        return key

    async def _tokenized(self, raw: RawRequest, model: ServedModel) -> tuple[RawRequest, Sequence[int]]:
        given = 0 if raw.token_ids is None or raw.first is not None else len(raw.token_ids)  # maybe an array: no bool
        size = self._size_of(raw) + given // 4 + raw.size_words
        return await self.beside_loop(size, lambda: tokenized(raw, self.tokenizer, model))

    async def tokens_of(self, raw: RawRequest, *, add_special_tokens: bool | None = None) -> Sequence[int]:
        """Of a request that was checked."""
        return await self.aside(self._size_of(raw), lambda: tokenize(raw, self.tokenizer, add_special_tokens))

    def _size_of(self, raw: RawRequest) -> int:
        return raw.size_chars + (_INLINE_TOKENIZE_BYTES if self.tokenizer.takes_long(raw.chat) else 0)

    async def aside(self, size_bytes: int, work: Callable[[], T]) -> T:
        """As `beside_loop`, for what is no request: no limit counts it, no prompt waits. Raises RequestRefused."""
        if size_bytes <= _INLINE_TOKENIZE_BYTES:
            return work()
        if self._aside_waiting >= _MAX_ASIDE:
            raise refuse(
                Code.RESOURCE_EXHAUSTED,
                f"{_MAX_ASIDE} long texts wait to be tokenized or detokenized; retry later, or send shorter ones",
                retry_after_ms=1000,
            )
        self._aside_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._aside, work)
        finally:
            self._aside_waiting -= 1

    async def beside_loop(self, size_bytes: int, work: Callable[[], T]) -> T:
        """Work on text, on a thread where the text is long."""
        if size_bytes <= _INLINE_TOKENIZE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def format_verdict(self, structured: Structured) -> str:
        """Why a format cannot be used; "" if it can. Raises RequestRefused where that takes too long to say."""
        return await self._structured.verdict(structured)

    def dispatch(
        self,
        request: Request,
        placement: Placement,
        client: BufferedClient,
        trace: RequestTrace,
        way: Pass | None = None,
    ) -> None:
        """Place an admitted request and start its life. Raises RequestRefused."""
        now = self._clock()
        first = self._forks.first_of(request)
        if first is None:
            request, route = self._place(request, placement, now)
        else:
            request, route = self._forks.waiting(request, first)
        self._planner.budget.request_came(now)
        life = life_of(request)(
            request,
            route,
            workers=self._ports,
            client=client,
            text=self._new_text(request),
            leg_numbers=self._leg_numbers,
            handoff_prefix=self._handoff_prefix,
            planner=self._planner,
            limits=RecoveryLimits(self.config.max_attempts, self.config.recovery_wait_s),
        )
        life.breakdown.admitted = now
        live = Live(life, client, trace, way or Pass(self.gate, ANYBODY))
        self._live[request.key] = live
        self.requests_total += not request.again
        self.recent.appendleft((life, now))
        live.timer = self._call_later(
            max(0.0, request.deadline - now), lambda: self._tell_request(request.key, Life.on_deadline)
        )
        if first is None:
            self.counts.placed(route)
            self._tell(live, Life.start)
        else:
            live.wait_for(first)
            self._touch(first)
        self.flush()

    def _place(self, request: Request, placement: Placement, now: float) -> tuple[Request, Route]:
        """Raises RequestRefused."""
        emitted = len(request.emitted)
        facts = RequestFacts(
            len(request.prompt) + emitted,
            max(1, request.sampling.room_tokens - emitted),
            self._planner.placement(request, placement),
            self._planner.cached_tokens(request, emitted),
            priority=request.priority,
            time_left_s=request.deadline - now,
            affine=self._sessions.workers_of(request) or self.adapters.loaded_on(request.adapter),
            waited_ms=(now - request.arrived) * 1e3,
            expected_tokens=self.answer_tokens.expected(request.sampling.max_tokens - emitted),
            lot=self._planner.lot(request),
        )
        request, route = self._planner.first(request, facts)
        self._sessions.served(request, route)
        if placement is Placement.AUTO:
            self.cluster.decided(route.decode, split=route.split)
        return request, route

    def _tell(self, live: Live, call: Callable[[Life, float], None]) -> None:
        try:
            call(live.life, self._clock())
        except BaseException as error:
            self._broken(live, error)
        self._touch(live)

    def _broken(self, live: Live, error: BaseException) -> None:
        """A bug met by one request: it ends with an error, and the others, and the worker's stream, go on.

        Panics of libraries in Rust, a tokenizer's for example, are no Exceptions.
        """
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise error
        request_id = live.life.request.request_id
        log.exception("request %s: the router failed", request_id, extra={"request_id": request_id})
        live.life.fail(our_failure(error), self._clock())

    def _new_text(self, request: Request) -> Text:
        s, shown = request.sampling, self.tool_markers if request.tools else None
        return TextStream(self.tokenizer, s.stop, s.min_tokens, shown, s.stop_token_ids, *s.of_text)

    def cancel(self, key: str) -> None:
        self._tell_request(key, Life.cancel)

    def fail_all(self, failure: Failure) -> None:
        for live in list(self._live.values()):
            self._tell(live, lambda life, now: life.fail(failure, now))
        self.flush()

    def _tell_request(self, key: str, call: Callable[[Life, float], None]) -> None:
        live = self._live.get(key)
        if live is not None:
            self._tell(live, call)
            self.flush()

    def decide(self, facts: RequestFacts) -> Route | Rejection:
        return decide(facts, self.cluster.view(), self.params, self._clock(), self._rng)

    # Workers, as Life asks for them.

    def start_leg(self, worker: WorkerKey, start: LegStart, prefill_tokens: int) -> None:
        live = self._by_leg[start.leg] = self._live[start.request.key]
        live.life.breakdown.legs[start.leg] = self._clock()
        entry = self.cluster.workers[worker]
        known = len(start.request.prompt) + len(start.emitted) + start.beam_tokens
        shares = live.life.route.rule == BESIDE and start.pull is None  # the prompt's whole blocks, which are held
        blocks = entry.info.blocks_of(prefill_tokens if shares else known)
        decodes = 0 if start.serve_handoff_id else 1
        source = start.pull[1] if start.pull is not None else start.prefix[1].holder if start.prefix else None
        promise = Promise(prefill_tokens, blocks, decodes, start.incoming_bytes, source)
        self.cluster.dispatched(worker, start.leg, promise)
        begun, legs = live.life.breakdown, live.life.legs  # a reader that waits may have KV of the source before
        waits = start.serve_handoff_id and any(leg.role is LegRole.DECODE and leg.number in begun.legs for leg in legs)
        start = self._planner.mixed(start, worker, begun.mix, beside=shares or bool(waits))
        self._sender.start(worker, start, max(0.001, start.request.deadline - self._clock()))

    def cancel_leg(self, worker: WorkerKey, leg: int, reason: str, keep_lease: bool = False) -> None:
        self._suspects.cancelled(worker, leg)
        self._sender.cancel(worker, leg, reason, keep_lease)

    def continue_leg(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None:
        self._sender.continue_locally(worker, leg, emitted)

    def follow_leg(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...], pull: tuple[str, WorkerKey]) -> None:
        self._sender.follow(worker, leg, emitted, pull)

    def serve_leg(self, worker: WorkerKey, leg: int, handoff_id: str, most_tokens: int) -> None:
        self._sender.serve(worker, leg, handoff_id, most_tokens)

    def freeze_leg(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        self._sender.freeze(worker, leg, handoff_id)

    def keep_leg(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        self._sender.keep(worker, leg, handoff_id)

    def retry_later(self, key: str, delay_s: float) -> None:
        """A life that ended meanwhile is not found then."""
        self._call_later(delay_s, lambda: self._tell_request(key, Life.on_retry))

    def leg_computed(self, worker: WorkerKey, leg: int) -> None:
        self.cluster.computed(worker, leg)
        live = self._by_leg.get(leg)
        if live is not None:
            learn_early(live, self.cluster, self._clock())

    def resync_blocks(self, worker: WorkerKey) -> None:
        """Its block events came with a gap."""
        log.info("worker %s: block events are missing; asking for a snapshot", worker.worker_id)
        self._sender.resync_blocks(worker)

    def explain(self, request_id: str) -> Explained | None:
        """Of a live request, or one that ended lately; the newest, if none is named."""
        if not request_id and self.recent:
            request_id = self.recent[0][0].request.request_id
        live = next((one for one in self._live.values() if one.life.request.request_id == request_id), None)
        return self._history.get(request_id) if live is None else explain(live.life, live.adopted_ms)

    def leg_ended(self, worker: WorkerKey, leg: int) -> None:
        self.cluster.ended(worker, leg)
        self._by_leg.pop(leg, None)

    # What workers say. `flush` follows each message.

    def on_tokens(
        self,
        legs: Iterable[int],
        positions: Iterable[int],
        token_ids: Iterable[int],
        logprobs: dict[tuple[int, int], object],
    ) -> None:
        """One step's columns."""
        now = self._clock()
        by_leg, dirty = self._by_leg, self._dirty
        for leg, position, token_id in zip(legs, positions, token_ids, strict=True):
            live = by_leg.get(leg)
            if live is None:
                continue  # cancelled while the token was on its way
            value = logprobs.get((leg, position)) if logprobs else None
            try:
                live.life.on_token(leg, position, token_id, value, now)
            except BaseException as error:
                self._broken(live, error)
            dirty[id(live)] = live

    def on_prompt_logprobs(self, leg: int, message: object) -> None:
        self._with(leg, lambda life, now: life.on_prompt_logprobs(leg, message, now))

    def on_beams(self, leg: int, message: object) -> None:
        self._with(leg, lambda life, _: life.on_beams(leg, message) if isinstance(life, BeamLife) else None)

    def _moving(self, live: Live) -> None:
        self._touch(live)
        self.flush()

    def on_end(self, leg: int, reason: Finish | None, cached_tokens: int) -> None:
        self._with(leg, lambda life, now: life.on_end(leg, reason, cached_tokens, now))

    def on_error(self, leg: int, code: Code, message: str) -> None:
        self._with(leg, lambda life, now: life.on_error(leg, code, message, now))

    def on_handoff_failed(self, leg: int, handoff_id: str, reason: str, detail: str, kept_tokens: int) -> None:
        self._with(leg, lambda life, now: life.on_handoff_failed(leg, handoff_id, reason, detail, kept_tokens, now))

    def on_adopted(
        self, leg: int, handoff_id: str, kv_early_share: float, adopt_ms: float, pulled_bytes: int = 0
    ) -> None:
        self._with(leg, lambda life, now: life.on_adopted(leg, handoff_id, kv_early_share, adopt_ms, now, pulled_bytes))

    def on_caught_up(self, leg: int, handoff_id: str) -> None:
        self._with(leg, lambda life, now: life.on_caught_up(leg, handoff_id, now))

    def breakdown_of(self, leg: int) -> Breakdown | None:
        """Of the request that a leg is of, for what workers say of it besides."""
        live = self._by_leg.get(leg)
        return None if live is None else live.life.breakdown

    def on_first_step(self, leg: int, said: FirstStep) -> None:
        live = self._by_leg.get(leg)
        if live is not None:
            live.life.on_first_step(leg, said)

    def on_worker_lost(self, worker: WorkerKey, why: str, *, crashed: bool = False) -> None:
        """`crashed`: its process ended, or its engine, as far as can be told."""
        legs = self.cluster.lost(worker)
        given_up = self._suspects.of(worker, legs, why) if crashed else {}
        for leg in legs:
            reason = given_up.get(leg, "")
            self._with(leg, lambda life, now, leg=leg, reason=reason: life.on_worker_lost(leg, why, now, reason))
        self.flush()

    def on_worker_back(self, worker: WorkerKey) -> None:
        """Its stream is open; if it was before, it had not crashed."""
        crashes.came_back(worker, [live.life for live in self._live.values()])

    def register(self, info: WorkerInfo) -> None:
        """Raises RequestRefused."""
        self._revisions.check(info, any_live=bool(self._live))

    def _with(self, leg: int, call: Callable[[Life, float], None]) -> None:
        live = self._by_leg.get(leg)
        if live is not None:
            self._tell(live, call)

    def _touch(self, live: Live) -> None:
        self._dirty[id(live)] = live

    def flush(self) -> None:
        """Send on what the last messages changed, and bury requests that ended."""
        dirty, self._dirty = self._dirty, {}
        for live in dirty.values():
            live.client.wake()
            if live.waiting:
                self._forks.look(live)
            if live.life.over and self._live.get(live.life.request.key) is live:
                self._bury(live)
        if self._dirty:  # answers began that had waited for one of these
            self.flush()

    def _bury(self, live: Live) -> None:
        life = live.life
        if log.isEnabledFor(logging.DEBUG):
            log_end(live)
        del self._live[life.request.key]
        self.moves.forget(life.request.key)
        live.way.leave(life.request.counted(len(life.emitted)), self._clock())
        if live.timer is not None:
            live.timer.cancel()
        self._crowd.ended(self._clock())
        if life.outcome in COMPLETE and life.emitted:
            self.answer_tokens.observe(len(life.emitted))
            learn_itl(life, self.cluster, self._clock())
        self._history.add(explain(life, live.adopted_ms))
        self.tokens_total += len(life.emitted) - len(life.request.emitted)
        self.recoveries_total += life.recoveries
        if life.outcome not in (f.value for f in Finish):
            self.errors_total += 1
        self.counts.ended(life)
        if self.on_ended is not None:
            self.on_ended(life)
        live.trace.end(life)

    def check_empty(self) -> None:
        """No request is live: nothing of any may be left."""
        assert not self._live
        assert not self._admitting
        assert not self._by_leg
        self.cluster.check_empty()
