"""The router's gRPC surface: what clients call, what workers register with, what people look at."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import grpc
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2, worker_pb2, worker_pb2_grpc

from router.admission import another
from router.clients import WorkerLinks
from router.dispatcher import Dispatcher
from router.doors.grpc.buffers import CallBuffer, Lag, SessionBuffer, SessionClient, best, session_error
from router.doors.grpc.lenient import Malformed, lenient
from router.doors.grpc.wire import (
    explained_to_wire,
    listeners_to_wire,
    migration_to_wire,
    recent_to_wire,
    request_from_wire,
    scaling_to_wire,
    wish_to_wire,
    worker_to_wire,
)
from router.errors import Code, Failure, RequestRefused, refuse
from router.record.scaled import ScalingLog
from router.status import abort
from router.wire import info_from_wire
from settings.listeners import listeners
from settings.tls import NotAMember, Wiring
from settings.versions import OURS

log = logging.getLogger(__name__)

MAX_ANSWERS = 128  # to one prompt
_MAX_LIVE_PER_SESSION = 4096
_MIGRATIONS_SHOWN = 32
_SCALING_SHOWN = cluster_pb2.GetScalingRequest(last=8, changes_only=True)  # on the page
_SESSION_LAG = 16  # a session may lag by so many times what one call may
_STARTS_AT_ONCE = 16  # admissions of one session between two turns of everybody else


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
        lag, wake = Lag(self._dispatcher.config.max_lag_tokens), asyncio.Event()
        n = max(1, request.n)
        searched = request.HasField("beam_search")  # whose best answers are known at its end without a comparison
        best_of = min(n if searched else max(n, request.best_of), MAX_ANSWERS)
        compared = best_of > n
        logprobs = not compared or request.sampling.HasField("logprobs")
        answers = [
            CallBuffer(None if compared or searched else lag, wake, number, says_logprobs=logprobs)
            for number in range(best_of)
        ]
        live: list[str] = []

        def cancel_all() -> None:
            for key in live:
                self._dispatcher.cancel(key)  # nothing to do for those that ended

        try:
            await self._submit(request, answers, live, context)
            over = False
            while not over:
                await wake.wait()
                wake.clear()
                # Before the writes: what comes while one is under way is for the next turn.
                failure = next((answer.failure for answer in answers if answer.failure is not None), None)
                over = failure is not None or all(answer.done for answer in answers)
                if compared:
                    responses = best(answers, n) if over and failure is None else []
                else:
                    responses = [response for answer in answers for response in answer.take()]
                for response in responses:
                    await context.write(response)
                if failure is not None:
                    await abort(context, failure)
        except RequestRefused as error:
            cancel_all()
            await abort(context, error.failure)
        except asyncio.CancelledError:
            cancel_all()
            if not lag.exceeded:
                raise
            await lag.abort(context)
        finally:
            cancel_all()  # the client left

    async def _submit(
        self,
        request: generate_pb2.GenerateRequest,
        answers: Sequence[CallBuffer],
        live: list[str],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Raises RequestRefused; those that were admitted before are in `live`."""
        n = max(1, request.n)
        if n > MAX_ANSWERS:
            raise refuse(Code.INVALID_ARGUMENT, f"n is {n}; use 1..{MAX_ANSWERS}", field="n")
        if n > 1 and request.emitted_token_ids:
            why = f"n is {n} with emitted_token_ids; resume each answer by itself"
            raise refuse(Code.INVALID_ARGUMENT, why, field="n")
        best_of = n if request.HasField("beam_search") else request.best_of or n
        if not n <= best_of <= MAX_ANSWERS:
            why = f"best_of is {best_of}; use n ({n}) to {MAX_ANSWERS}, or leave it out"
            raise refuse(Code.INVALID_ARGUMENT, why, field="best_of")
        raw = replace(request_from_wire(request), answers=best_of)
        if best_of > n and raw.sampling.logprobs is None:  # by which they are compared
            raw = replace(raw, sampling=replace(raw.sampling, logprobs=0))
        for number, answer in enumerate(answers):
            first = answers[0].life
            if first is not None:
                raw_id = f"{first.request.request_id}-{number}"
                one = replace(another(raw, number, first.request), request_id=raw_id)
            else:
                one = raw
            left_s, trace_context = context.time_remaining(), trace_context_of(context)
            live.append(await self._dispatcher.submit(one, answer, grpc_deadline_s=left_s, trace_context=trace_context))
            if number % _STARTS_AT_ONCE == _STARTS_AT_ONCE - 1:
                await asyncio.sleep(0)
            if any(answer.failure is not None for answer in answers[: number + 1]):
                return  # one that failed fails the call

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
            if request.HasField("beam_search"):
                why = "beam_search is for Generate, whose answers may come whole; leave it out in a session"
                raise refuse(Code.INVALID_ARGUMENT, why, field="beam_search")
            if max(request.n, request.best_of) > 1:
                why = "n and best_of are for Generate; in a session start a request for each answer"
                raise refuse(Code.INVALID_ARGUMENT, why, field="n")
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
                mixed_quantization=d.cluster.mixed,
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
