"""The router's gRPC surface: what clients call, what workers register with, what people look at.

A request's tokens wait in a buffer that its Life fills and one writer empties: no task, await or queue per token, one
message per turn of the writer. When the client lags, tokens coalesce; when it lags without end, it is cut off.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2, worker_pb2, worker_pb2_grpc

from router.clients import WorkerLinks
from router.dispatcher import Dispatcher
from router.doors.grpc.lenient import Malformed, lenient
from router.doors.grpc.wire import (
    explained_to_wire,
    finished_to_wire,
    listeners_to_wire,
    migration_to_wire,
    recent_to_wire,
    request_from_wire,
    scaling_to_wire,
    started_to_wire,
    wish_to_wire,
    worker_to_wire,
)
from router.errors import Code, Failure, RequestRefused, refuse
from router.lifecycle import Life
from router.record.scaled import ScalingLog
from router.request import Finish
from router.status import abort
from router.wire import info_from_wire
from settings.listeners import listeners
from settings.tls import NotAMember, Wiring
from settings.versions import OURS

log = logging.getLogger(__name__)

_MAX_LIVE_PER_SESSION = 4096
_MIGRATIONS_SHOWN = 32
_SCALING_SHOWN = cluster_pb2.GetScalingRequest(last=8, changes_only=True)  # on the page
_SESSION_LAG = 16  # a session may lag by so many times what one call may
_MAX_TOKENS_PER_RESPONSE = 16384  # stays well below the 4 MB that a client accepts by default
_STARTS_AT_ONCE = 16  # admissions of one session between two turns of everybody else


class Lag:
    """The bound on what one client may leave unread. Past it the writer is cancelled: it may be stuck in a write."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._writer = asyncio.current_task()
        self.exceeded = False

    def check(self, waiting_tokens: int) -> None:
        if waiting_tokens >= self._max_tokens and not self.exceeded:
            self.exceeded = True
            assert self._writer is not None
            self._writer.cancel("the client does not read")

    async def abort(self, context: grpc.aio.ServicerContext) -> None:
        """In place of the cancellation, which gRPC would not tell the client of."""
        assert self._writer is not None
        self._writer.uncancel()
        failure = Failure(
            Code.RESOURCE_EXHAUSTED,
            f"the client left {self._max_tokens} tokens or events unread and is cut off; read faster, or ask for less",
        )
        try:
            await abort(context, failure)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # gRPC's type for a call that ended meanwhile is not public
            log.info("a client that was cut off is gone: %s", error)


class CallBuffer:
    """One Generate call. Tokens that pile up while the client lags leave as one message."""

    def __init__(self, lag: Lag) -> None:
        self.lag = lag
        self._wake = asyncio.Event()
        self._out: list[generate_pb2.GenerateResponse] = []
        self._tokens: generate_pb2.Tokens | None = None
        self._texts: list[str] = []
        self.waiting_tokens = 0
        self.done = False
        self.failure: Failure | None = None

    # Client.

    def started(self, life: Life) -> None:
        self._out.append(generate_pb2.GenerateResponse(started=started_to_wire(life)))

    def token(self, position: int, token_id: int, text: str, logprobs: Any | None) -> None:
        tokens = self._tokens
        if tokens is None:
            response = generate_pb2.GenerateResponse()
            tokens = self._tokens = response.tokens
            tokens.position = position
            self._out.append(response)
        if token_id >= 0:
            tokens.token_ids.append(token_id)
            self.waiting_tokens += 1
            self.lag.check(self.waiting_tokens)
        if text:
            self._texts.append(text)
        if logprobs is not None:
            tokens.logprobs.append(logprobs)

    def finished(self, life: Life, reason: Finish) -> None:
        self._seal()
        self._out.append(generate_pb2.GenerateResponse(finished=finished_to_wire(life, reason)))
        self.done = True

    def failed(self, life: Life, failure: Failure) -> None:
        self._seal()
        self.failure = failure
        self.done = True

    def wake(self) -> None:
        self._wake.set()

    # Writer.

    async def take(self) -> list[generate_pb2.GenerateResponse]:
        """Waits until there is something; may return nothing when only the end is new."""
        await self._wake.wait()
        self._wake.clear()
        self._seal()
        out, self._out = self._out, []
        self.waiting_tokens = 0
        return out

    def _seal(self) -> None:
        if self._tokens is not None:
            self._tokens.text = "".join(self._texts)
            self._tokens = None
            self._texts = []


class SessionBuffer:
    """All requests of one Session: one response per turn of its writer, common tokens in columns."""

    def __init__(self, lag: Lag) -> None:
        self.lag = lag
        self.wake_event = asyncio.Event()
        self._handles: list[int] = []
        self._positions: list[int] = []
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._events: list[generate_pb2.SessionEvent] = []
        self.request_ids: dict[int, str] = {}  # live handles; "" while being admitted
        self.cancelled: set[int] = set()  # cancelled while being admitted

    @property
    def waiting_tokens(self) -> int:
        return len(self._handles) + len(self._events)

    def take(self) -> generate_pb2.SessionResponse | None:
        if not self._handles and not self._events:
            return None
        most = _MAX_TOKENS_PER_RESPONSE
        response = generate_pb2.SessionResponse(
            handles=self._handles[:most],
            positions=self._positions[:most],
            token_ids=self._token_ids[:most],
            texts=self._texts[:most],
        )
        if len(self._handles) > most:  # a reader that lagged: its events follow after the last column
            for column in (self._handles, self._positions, self._token_ids, self._texts):
                del column[:most]
            return response
        response.events.extend(self._events)
        self._handles, self._positions, self._token_ids, self._texts, self._events = [], [], [], [], []
        return response

    def event(self, event: generate_pb2.SessionEvent) -> None:
        self._events.append(event)
        self.wake()

    def wake(self) -> None:
        """Once per request and step. A writer that is stuck in a write cannot look at the bound: so it is done here."""
        self.wake_event.set()
        self.lag.check(self.waiting_tokens)


class SessionClient:
    """One request of a session, as its Life sees it. For one handle, a reader takes columns before events."""

    def __init__(self, handle: int, session: SessionBuffer) -> None:
        self._handle = handle
        self._session = session

    def started(self, life: Life) -> None:
        self._session._events.append(generate_pb2.SessionEvent(handle=self._handle, started=started_to_wire(life)))

    def token(self, position: int, token_id: int, text: str, logprobs: Any | None) -> None:
        session = self._session
        if logprobs is not None or token_id < 0:
            tokens = generate_pb2.Tokens(position=position, text=text)
            if token_id >= 0:
                tokens.token_ids.append(token_id)
            if logprobs is not None:
                tokens.logprobs.append(logprobs)
            session._events.append(generate_pb2.SessionEvent(handle=self._handle, tokens=tokens))
            return
        session._handles.append(self._handle)
        session._positions.append(position)
        session._token_ids.append(token_id)
        session._texts.append(text)

    def finished(self, life: Life, reason: Finish) -> None:
        self._session.request_ids.pop(self._handle, None)
        self._session._events.append(
            generate_pb2.SessionEvent(handle=self._handle, finished=finished_to_wire(life, reason))
        )

    def failed(self, life: Life, failure: Failure) -> None:
        self._session.request_ids.pop(self._handle, None)
        self._session._events.append(session_error(self._handle, failure))

    def wake(self) -> None:
        self._session.wake()


def session_error(handle: int, failure: Failure) -> generate_pb2.SessionEvent:
    return generate_pb2.SessionEvent(
        handle=handle,
        error=generate_pb2.SessionError(
            code=int(failure.code), message=failure.message, retry_after_ms=failure.retry_after_ms
        ),
    )


class GenerateServicer:
    """Both ways in. Raises nothing: every end is a message or a status."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def handlers(self) -> grpc.GenericRpcHandler:
        limit = self._dispatcher.config.max_prompt_bytes
        return grpc.method_handlers_generic_handler(
            "diptych.v1.GenerateService",
            {
                "Generate": grpc.unary_stream_rpc_method_handler(
                    self.generate,
                    request_deserializer=lenient(generate_pb2.GenerateRequest.FromString, limit),
                    response_serializer=generate_pb2.GenerateResponse.SerializeToString,
                ),
                "Session": grpc.stream_stream_rpc_method_handler(
                    self.session,
                    request_deserializer=lenient(generate_pb2.SessionRequest.FromString, limit),
                    response_serializer=generate_pb2.SessionResponse.SerializeToString,
                ),
            },
        )

    async def generate(
        self, request: generate_pb2.GenerateRequest | Malformed, context: grpc.aio.ServicerContext
    ) -> None:
        if isinstance(request, Malformed):
            await abort(context, request.failure)
            return
        buffer = CallBuffer(Lag(self._dispatcher.config.max_lag_tokens))
        try:
            request_id = await self._dispatcher.submit(
                request_from_wire(request),
                buffer,
                grpc_deadline_s=context.time_remaining(),
                trace_context=trace_context_of(context),
            )
        except RequestRefused as error:
            await abort(context, error.failure)
            return
        try:
            over = False
            while not over:
                responses = await buffer.take()
                over = buffer.done  # before the writes: what comes while one is under way is for the next turn
                for response in responses:
                    await context.write(response)
            if buffer.failure is not None:
                await abort(context, buffer.failure)
        except asyncio.CancelledError:
            self._dispatcher.cancel(request_id)
            if not buffer.lag.exceeded:
                raise
            await buffer.lag.abort(context)
        finally:
            self._dispatcher.cancel(request_id)  # nothing to do if it ended; else the client left

    async def session(
        self,
        request_iterator: AsyncIterator[generate_pb2.SessionRequest | Malformed],
        context: grpc.aio.ServicerContext,
    ) -> None:
        buffer = SessionBuffer(Lag(self._dispatcher.config.max_lag_tokens * _SESSION_LAG))
        trace_context = trace_context_of(context)
        admissions: set[asyncio.Task[None]] = set()

        def start(handle: int, request: generate_pb2.GenerateRequest) -> None:
            if handle in buffer.request_ids:
                failure = Failure(Code.ALREADY_EXISTS, f"handle {handle} is live on this session; use another")
                buffer.event(session_error(handle, failure))
                return
            if len(buffer.request_ids) >= _MAX_LIVE_PER_SESSION:
                failure = Failure(
                    Code.RESOURCE_EXHAUSTED,
                    f"{_MAX_LIVE_PER_SESSION} requests are live on this session; wait for some to end, or open another",
                    1000,
                )
                buffer.event(session_error(handle, failure))
                return
            buffer.request_ids[handle] = ""  # being admitted
            task = asyncio.create_task(self._start_in_session(handle, request, buffer, context, trace_context))
            admissions.add(task)
            task.add_done_callback(admissions.discard)

        def end_all() -> None:
            reading.cancel()
            for task in list(admissions):
                task.cancel()
            for request_id in [r for r in buffer.request_ids.values() if r]:
                self._dispatcher.cancel(request_id)

        reading = asyncio.create_task(self._read_session(request_iterator, buffer, start))
        reading.add_done_callback(lambda task: (buffer.wake_event.set(), task.cancelled() or task.exception()))
        try:
            while True:
                await buffer.wake_event.wait()
                buffer.wake_event.clear()
                while (response := buffer.take()) is not None:
                    await context.write(response)
                if reading.done():
                    if not reading.cancelled() and isinstance(reading.exception(), RequestRefused):
                        await abort(context, reading.exception().failure)  # type: ignore[union-attr]
                    return  # the client ended its side: what is live is cancelled below
        except asyncio.CancelledError:
            end_all()
            if not buffer.lag.exceeded:
                raise
            await buffer.lag.abort(context)
        finally:
            end_all()

    async def _read_session(
        self,
        requests: AsyncIterator[generate_pb2.SessionRequest | Malformed],
        buffer: SessionBuffer,
        start: Callable[[int, generate_pb2.GenerateRequest], None],
    ) -> None:
        async for message in requests:
            if isinstance(message, Malformed):
                raise RequestRefused(message.failure)
            if max(len(message.starts), len(message.cancels)) > _MAX_LIVE_PER_SESSION:
                raise refuse(
                    Code.INVALID_ARGUMENT,
                    f"a message has {len(message.starts)} starts and {len(message.cancels)} cancels; send at most "
                    f"{_MAX_LIVE_PER_SESSION} of each, which is how many requests may be live",
                )
            for number, one in enumerate(message.starts, 1):
                start(one.handle, one.request)
                if number % _STARTS_AT_ONCE == 0:
                    await asyncio.sleep(0)  # others have their turn, and a client that is cut off is not read on
            for one in message.cancels:
                request_id = buffer.request_ids.get(one.handle)
                if request_id:
                    self._dispatcher.cancel(request_id)
                elif request_id == "":
                    buffer.cancelled.add(one.handle)  # still being admitted

    async def _start_in_session(
        self,
        handle: int,
        request: generate_pb2.GenerateRequest,
        buffer: SessionBuffer,
        context: grpc.aio.ServicerContext,
        trace_context: dict[str, str],
    ) -> None:
        client = SessionClient(handle, buffer)
        try:
            request_id = await self._dispatcher.submit(
                request_from_wire(request),
                client,
                grpc_deadline_s=context.time_remaining(),
                trace_context=trace_context,
            )
        except RequestRefused as error:
            buffer.request_ids.pop(handle, None)
            buffer.cancelled.discard(handle)
            buffer.event(session_error(handle, error.failure))
            return
        if handle in buffer.request_ids:
            buffer.request_ids[handle] = request_id
        if handle in buffer.cancelled:
            buffer.cancelled.discard(handle)
            self._dispatcher.cancel(request_id)


def trace_context_of(context: grpc.aio.ServicerContext) -> dict[str, str]:
    metadata = context.invocation_metadata() or ()
    return {k: str(v) for k, v in metadata if k in ("traceparent", "tracestate")}


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    def __init__(
        self,
        router_id: str,
        dispatcher: Dispatcher,
        scaling: ScalingLog,
        clock: Callable[[], float],
        not_serving_reason: Callable[[], str],
        inside: Wiring | None = None,
        metrics_address: str = "",
    ) -> None:
        """`inside`: for the internal port, where members of the cluster ask. At the public port callers are checked."""
        self._inside = inside
        self._router_id = router_id
        self._dispatcher = dispatcher
        self._scaling = scaling
        self._clock = clock
        self._not_serving_reason = not_serving_reason
        self._metrics_address = metrics_address
        self._started = clock()

    def cluster(self) -> cluster_pb2.Cluster:
        d, now = self._dispatcher, self._clock()
        reason = self._not_serving_reason()
        return cluster_pb2.Cluster(
            router=cluster_pb2.RouterState(
                router_id=self._router_id,
                model=d.model_name,
                live_requests=d.live_requests,
                requests_total=d.requests_total,
                errors_total=d.errors_total,
                refused_total=d.counts.refused_total + d.gate.refused_total,
                tokens_total=d.tokens_total,
                recoveries_total=d.recoveries_total,
                retries_total=d.retries_total,
                uptime_s=now - self._started,
                serving=not reason,
                not_serving_reason=reason,
                context_limit_tokens=d.served_model().context_limit_tokens,
                listeners=listeners_to_wire(listeners()),
                metrics_address=self._metrics_address,
                other_routers=d.others.ids(),
            ),
            workers=[worker_to_wire(e, now) for e in d.cluster.workers.values()],
            recent=recent_to_wire((life for life, _ in d.recent), now),
            migrations=[migration_to_wire(moved, now) for moved in itertools.islice(d.moves.log, _MIGRATIONS_SHOWN)],
            wish=wish_to_wire(self._scaling.wish(now), now),
        )

    async def _check(self, context: grpc.aio.ServicerContext) -> None:
        try:
            if self._inside is not None:
                self._inside.check_peer(context, "router", "worker")
        except NotAMember as error:
            await abort(context, Failure(Code.PERMISSION_DENIED, str(error)))

    async def GetCluster(
        self, request: cluster_pb2.GetClusterRequest, context: grpc.aio.ServicerContext
    ) -> cluster_pb2.GetClusterResponse:
        await self._check(context)
        return cluster_pb2.GetClusterResponse(cluster=self.cluster())

    async def Explain(
        self, request: cluster_pb2.ExplainRequest, context: grpc.aio.ServicerContext
    ) -> cluster_pb2.ExplainResponse:
        await self._check(context)
        explained = self._dispatcher.explain(request.request_id)
        if explained is None:
            asked = request.request_id[:100]
            what = f"request {asked!r} is not known here, or not any more" if asked else "no request came yet"
            message = f"{what}; the ids of the last requests are in `diptych status`"
            await abort(context, Failure(Code.NOT_FOUND, message, field="request_id"))
            raise AssertionError from None
        return cluster_pb2.ExplainResponse(explanation=explained_to_wire(explained, self._clock()))

    def scaling(self, asked: cluster_pb2.GetScalingRequest = _SCALING_SHOWN) -> cluster_pb2.GetScalingResponse:
        return scaling_to_wire(self._scaling, asked, self._clock())

    async def GetScaling(
        self, request: cluster_pb2.GetScalingRequest, context: grpc.aio.ServicerContext
    ) -> cluster_pb2.GetScalingResponse:
        await self._check(context)
        return self.scaling(request)

    async def WatchCluster(
        self, request: cluster_pb2.WatchClusterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[cluster_pb2.WatchClusterResponse]:
        await self._check(context)
        interval_ms = request.interval_ms or 1000
        if not 100 <= interval_ms <= 60000:
            await abort(
                context,
                Failure(Code.INVALID_ARGUMENT, f"interval_ms is {interval_ms}; use 100..60000", field="interval_ms"),
            )
        while True:
            yield cluster_pb2.WatchClusterResponse(cluster=self.cluster())
            await asyncio.sleep(interval_ms / 1e3)


class RegistryServicer(worker_pb2_grpc.RegistryServiceServicer):
    def __init__(
        self, router_id: str, dispatcher: Dispatcher, links: WorkerLinks, heartbeat_s: float, wiring: Wiring
    ) -> None:
        self._router_id = router_id
        self._dispatcher = dispatcher
        self._links = links
        self._heartbeat_s = heartbeat_s
        self._wiring = wiring

    async def Register(
        self, request: worker_pb2.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RegisterResponse:
        try:
            self._wiring.check_peer(context, "worker")
            info = info_from_wire(request)
            self._dispatcher.register(info)
            self._links.registered(info, leaving=request.leaving)
        except NotAMember as error:
            await abort(context, Failure(Code.PERMISSION_DENIED, f"no registration: {error}"))
            raise AssertionError from None
        except RequestRefused as error:
            await abort(context, error.failure)
            raise AssertionError from None
        self._dispatcher.others.heard(info.key, request.routers)
        return worker_pb2.RegisterResponse(
            router_id=self._router_id,
            heartbeat_ms=int(self._heartbeat_s * 1e3),
            leaving=self._dispatcher.leaving,
            protocol=OURS.version,
            oldest_protocol=OURS.oldest,
        )
