"""Where requests, workers and decisions meet. Runs on the event loop; every call returns at once but `submit`.

submit: check -> tokenize (beside the loop) -> decide -> Life.start
worker messages -> Life.on_... -> effects on WorkerPorts and the client's buffer -> `flush` once per message
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from kv_transfer.block_hash import chain_hashes, root_hash
from router.admission import RawRequest, ServedModel, admit, check_before_tokenizing, tokenize
from router.cluster import Cluster, Promise, Role, WorkerInfo
from router.config import RouterConfig
from router.errors import Code, Failure, RequestRefused, refuse
from router.lifecycle import Client, Finish, LegStart, Life
from router.policy import (
    Placement,
    PolicyParams,
    Rejection,
    RequestFacts,
    Route,
    WorkerKey,
    decide,
)
from router.text import TextStream, Tokenizer
from router.tracing import RequestTrace

_INLINE_TOKENIZE_BYTES = 4096  # below a millisecond: a hop to a thread costs as much
_RECENT = 64


class Sender(Protocol):
    """The streams to the workers; each call buffers."""

    def start(self, worker: WorkerKey, start: LegStart, deadline_s: float) -> None: ...

    def cancel(self, worker: WorkerKey, leg: int, reason: str) -> None: ...

    def continue_locally(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None: ...


class BufferedClient(Client, Protocol):
    """A client whose buffer is sent on when the router has nothing more to add for now."""

    def wake(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Live:
    life: Life
    client: BufferedClient
    trace: RequestTrace
    timer: asyncio.TimerHandle | None = None


class _Ports:
    """The dispatcher as a Life sees it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.start = dispatcher.start_leg
        self.cancel = dispatcher.cancel_leg
        self.continue_locally = dispatcher.continue_leg
        self.computed = dispatcher.cluster.computed
        self.ended = dispatcher.leg_ended


class Dispatcher:
    def __init__(
        self, config: RouterConfig, tokenizer: Tokenizer, sender: Sender, rng: random.Random, clock: Callable[[], float]
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.cluster = Cluster()
        self.params = PolicyParams(config.itl_target_ms, config.max_local_stall_steps)
        self.model_name = config.served_model_name or tokenizer.name
        self.recent: deque[tuple[Life, float]] = deque(maxlen=_RECENT)  # newest first
        self.requests_total = 0
        self.errors_total = 0
        self.tokens_total = 0
        self.leaving = False
        self._sender = sender
        self._ports = _Ports(self)
        self._rng = rng
        self._clock = clock
        self._leg_numbers = itertools.count(1)
        self._by_leg: dict[int, _Live] = {}
        self._live: dict[str, _Live] = {}
        self._admitting: set[str] = set()
        self._dirty: dict[int, _Live] = {}
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def live_requests(self) -> int:
        return len(self._live) + len(self._admitting)

    def served_model(self) -> ServedModel:
        """The tokenizer's view, narrowed by what the workers can do."""
        infos = [e.info for e in self.cluster.workers.values()]
        limits = [i.context_limit_tokens for i in infos] + [self.tokenizer.context_limit_tokens or 1 << 30]
        sizes = [i.vocab_size for i in infos] or [self.tokenizer.vocab_size or 1 << 30]
        return ServedModel(self.model_name, min(sizes), min(limits), self.tokenizer.eos_token_ids)

    # Requests.

    async def submit(
        self,
        raw: RawRequest,
        client: BufferedClient,
        *,
        grpc_deadline_s: float | None = None,
        trace_context: Mapping[str, str] | None = None,
    ) -> str:
        """Admit and dispatch. Returns the request id. Raises RequestRefused before any work is done."""
        now = self._clock()
        if self.leaving:
            raise refuse(Code.UNAVAILABLE, "this router is leaving; retry, another one answers", retry_after_ms=200)
        if self.live_requests >= self.config.max_live_requests:
            raise refuse(
                Code.RESOURCE_EXHAUSTED,
                f"{self.live_requests} requests are live, which is this router's limit; retry later",
                retry_after_ms=1000,
            )
        model = self.served_model()
        check_before_tokenizing(raw, self.config, model)
        request_id = raw.request_id or f"{self._rng.getrandbits(64):016x}"
        if request_id in self._live or request_id in self._admitting:
            raise refuse(
                Code.ALREADY_EXISTS,
                f"request id {request_id!r} is live; choose another, or leave it empty",
                field="request_id",
            )
        self._admitting.add(request_id)
        try:
            trace = RequestTrace(request_id, trace_context)
            size = len(raw.text or "") + sum(len(c) for _, c in raw.chat or ())
            if size > _INLINE_TOKENIZE_BYTES:
                loop = asyncio.get_running_loop()
                prompt = await loop.run_in_executor(self._threads, tokenize, raw, self.tokenizer)
            else:
                prompt = tokenize(raw, self.tokenizer)
            request = admit(
                raw, prompt, self.config, model, now, grpc_deadline_s, request_id, self._rng, trace.traceparent
            )
            cached = self._cached_tokens(request.prompt, request.cache_salt)
            route = self._decide(len(prompt), request.sampling.max_tokens, raw.placement, cached, frozenset())
            if isinstance(route, Rejection):
                raise RequestRefused(route.failure)
        finally:
            self._admitting.discard(request_id)

        def place(exclude: frozenset[WorkerKey]) -> Route | Rejection:
            left = request.sampling.max_tokens
            return self._decide(len(prompt), left, Placement.LOCAL, {}, exclude)

        life = Life(
            request,
            route,
            workers=self._ports,
            client=client,
            text=TextStream(self.tokenizer, request.sampling.stop, request.sampling.min_tokens),
            leg_numbers=self._leg_numbers,
            place=place,
            max_attempts=self.config.max_attempts,
        )
        live = _Live(life, client, trace)
        self._live[request_id] = live
        self.requests_total += 1
        self.recent.appendleft((life, now))
        loop = asyncio.get_running_loop()
        live.timer = loop.call_later(max(0.0, request.deadline - self._clock()), self._deadline, request_id)
        self._started(live, life.start(self._clock()))
        self._touch(live)
        self.flush()
        return request_id

    def cancel(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None:
            live.life.cancel(self._clock())
            self._touch(live)
            self.flush()

    def fail_all(self, failure: Failure) -> None:
        for live in list(self._live.values()):
            live.life.fail(failure, self._clock())
            self._touch(live)
        self.flush()

    def _deadline(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None:
            live.life.on_deadline(self._clock())
            self._touch(live)
            self.flush()

    def _decide(
        self,
        prompt_tokens: int,
        max_tokens: int,
        placement: Placement,
        cached: Mapping[WorkerKey, int],
        exclude: frozenset[WorkerKey],
    ) -> Route | Rejection:
        facts = RequestFacts(prompt_tokens, max_tokens, placement, cached, exclude)
        return decide(facts, self.cluster.view(), self.params, self._rng)

    def _cached_tokens(self, prompt: list[int] | object, salt: str) -> dict[WorkerKey, int]:
        """By worker, the leading prompt tokens that its cache is believed to hold."""
        info = next((e.info for e in self.cluster.ready(Role.DECODE)), None)
        if info is None or not len(self.cluster.prefixes):
            return {}
        root = root_hash(info.layout_fingerprint, info.block_tokens, salt)
        names = [h[:8] for h in chain_hashes(prompt, info.block_tokens, root)]  # type: ignore[arg-type]
        matched = self.cluster.prefixes.matched_blocks(names)
        return {worker: count * info.block_tokens for worker, count in matched.items()}

    # Workers, as Life asks for them.

    def start_leg(self, worker: WorkerKey, start: LegStart, prefill_tokens: int) -> None:
        entry = self.cluster.workers[worker]
        known = len(start.request.prompt) + len(start.emitted)
        blocks = -(-known // entry.info.block_tokens)
        self.cluster.dispatched(worker, start.leg, Promise(prefill_tokens, blocks))
        self._sender.start(worker, start, max(0.001, start.request.deadline - self._clock()))

    def cancel_leg(self, worker: WorkerKey, leg: int, reason: str) -> None:
        self._sender.cancel(worker, leg, reason)

    def continue_leg(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None:
        self._sender.continue_locally(worker, leg, emitted)

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
            started = live.life.on_token(leg, position, token_id, value, now)
            dirty[id(live)] = live
            if started:
                self._started(live, started)

    def on_end(self, leg: int, reason: Finish | None, cached_tokens: int) -> None:
        self._with(leg, lambda life, now: life.on_end(leg, reason, cached_tokens, now))

    def on_error(self, leg: int, code: Code, message: str) -> None:
        self._with(leg, lambda life, now: life.on_error(leg, code, message, now))

    def on_handoff_failed(self, leg: int, reason: str, detail: str) -> None:
        self._with(leg, lambda life, now: life.on_handoff_failed(leg, reason, detail, now))

    def on_adopted(self, leg: int, kv_early_share: float, adopt_ms: float) -> None:
        live = self._by_leg.get(leg)
        if live is not None:
            live.life.on_adopted(leg, kv_early_share, adopt_ms)

    def on_worker_lost(self, worker: WorkerKey, why: str) -> None:
        for leg in self.cluster.lost(worker):
            self._with(leg, lambda life, now, leg=leg: life.on_worker_lost(leg, why, now))
        self.flush()

    def register(self, info: WorkerInfo) -> None:
        """Checked against what is served. Raises RequestRefused."""
        if info.model != self.model_name:
            raise refuse(
                Code.FAILED_PRECONDITION,
                f"worker {info.key.worker_id} serves {info.model!r}, this router {self.model_name!r}; "
                "give both the same model and served_model_name",
            )

    def _with(self, leg: int, call: Callable[[Life, float], list[int]]) -> None:
        live = self._by_leg.get(leg)
        if live is not None:
            self._started(live, call(live.life, self._clock()))
            self._touch(live)

    def _started(self, live: _Live, legs: list[int]) -> None:
        for leg in legs:
            if not live.life.over:
                self._by_leg[leg] = live

    def _touch(self, live: _Live) -> None:
        self._dirty[id(live)] = live

    def flush(self) -> None:
        """Send on what the last messages changed, and bury requests that ended."""
        dirty, self._dirty = self._dirty, {}
        for live in dirty.values():
            live.client.wake()
            if live.life.over and self._live.get(live.life.request.request_id) is live:
                self._bury(live)

    def _bury(self, live: _Live) -> None:
        life = live.life
        del self._live[life.request.request_id]
        if live.timer is not None:
            live.timer.cancel()
        for leg in life.legs:
            self._by_leg.pop(leg.number, None)
        self.tokens_total += len(life.emitted)
        if life.outcome not in (f.value for f in Finish):
            self.errors_total += 1
        live.trace.end(life)

    def check_empty(self) -> None:
        """No request is live: nothing of any may be left."""
        assert not self._live
        assert not self._admitting
        assert not self._by_leg
        self.cluster.check_empty()
