"""GRPCInferenceService over the one Dispatcher.

A stream's requests each have an AnswerBuffer that their Life fills; one writer empties those that have something new.
The client's half-close lets live requests end (Triton's `stop_stream` waits for them); the end of the RPC cancels them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import grpc
from diptych.inference import open_inference_pb2 as pb
from diptych.inference import open_inference_pb2_grpc

from router.admission import RawRequest, another
from router.dispatcher import Dispatcher
from router.doors.grpc.buffers import Lag
from router.doors.grpc.service import trace_context_of
from router.doors.open_inference.request import Wanted
from router.doors.open_inference.tensors import invalid
from router.doors.open_inference.wire import (
    VERSION,
    answer_to_wire,
    check_model,
    error_to_wire,
    metadata_to_wire,
    wanted_from_wire,
)
from router.errors import Code, Failure, RequestRefused
from router.lifecycle import Life
from router.request import Finish

OPEN_INFERENCE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_SERVER_VERSION = "0.1.0"
_MAX_LIVE_PER_STREAM = 1024
_STREAM_LAG = 16  # a stream may lag by so many times what one call may
_STATUS_WANTED = "triton_grpc_error"  # Triton's metadata key: the first error is to end the stream with its status


def add_open_inference(servicer: OpenInferenceServicer, server: Any) -> None:
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)


class Sink(Protocol):
    def changed(self, buffer: AnswerBuffer) -> None: ...

    def unread(self, buffer: AnswerBuffer) -> None:
        """One more token that no response has carried yet."""
        ...


class AnswerBuffer:
    """One request, as its Life sees it. A streamed answer leaves in pieces, another one whole."""

    def __init__(self, wanted: Wanted, client_id: str, model: str, sink: Sink) -> None:
        self.wanted = wanted
        self.client_id = client_id
        self.done = False
        self.failure: Failure | None = None
        self._model = model
        self._sink = sink
        self._texts: list[str] = [wanted.prefix] if wanted.prefix else []
        self._input_tokens = 0
        self._output_tokens = 0
        self._reason = ""
        self.life: Life | None = None

    # Client.

    def started(self, life: Life) -> None:
        self.life = life
        self._input_tokens = len(life.request.prompt)

    def token(self, position: int, token_id: int, text: str, logprobs: object | None) -> None:
        if token_id >= 0:
            self._output_tokens += 1
        if text:
            self._texts.append(text)
        if self.wanted.stream:
            self._sink.unread(self)

    def finished(self, life: Life, reason: Finish) -> None:
        self._reason = reason.value
        self.done = True

    def failed(self, life: Life, failure: Failure) -> None:
        self.failure = failure
        self.done = True

    def wake(self) -> None:
        self._sink.changed(self)

    # Writer.

    def take(self) -> pb.ModelInferResponse | None:
        """None: nothing to send yet. Not for a request that failed."""
        if not self.done and not (self.wanted.stream and self._texts):
            return None
        text = "".join(self._texts)
        self._texts.clear()
        return answer_to_wire(
            self.wanted,
            model=self._model,
            client_id=self.client_id,
            texts=[text],
            finish_reasons=[self._reason],
            input_tokens=self._input_tokens,
            output_tokens=[self._output_tokens],
            final=self.done,
        )

    @staticmethod
    def all_of(buffers: Sequence[AnswerBuffer]) -> pb.ModelInferResponse:
        """Several answers to one prompt, all complete."""
        first = buffers[0]
        return answer_to_wire(
            first.wanted,
            model=first._model,
            client_id=first.client_id,
            texts=["".join(b._texts) for b in buffers],
            finish_reasons=[b._reason for b in buffers],
            input_tokens=first._input_tokens,
            output_tokens=[b._output_tokens for b in buffers],
            final=True,
        )


class WholeAnswers:
    """The sink of a ModelInfer."""

    def __init__(self, count: int) -> None:
        self.over = asyncio.Event()
        self.failure: Failure | None = None
        self._count = count
        self._done: set[AnswerBuffer] = set()

    def changed(self, buffer: AnswerBuffer) -> None:
        self.failure = self.failure or buffer.failure
        if buffer.done:
            self._done.add(buffer)
        if self.failure is not None or len(self._done) == self._count:
            self.over.set()

    def unread(self, buffer: AnswerBuffer) -> None:
        """Never: nothing is streamed."""


class StreamAnswers:
    """The sink of a ModelStreamInfer: what its writer has to send, in the order in which it came."""

    def __init__(self, model: str, lag: Lag) -> None:
        self.lag = lag
        self.wake_event = asyncio.Event()
        self.live: dict[AnswerBuffer, str] = {}  # -> request id; "" while being admitted
        self.first_failure: Failure | None = None
        self._model = model
        self._ready: dict[AnswerBuffer, None] = {}
        self._errors: list[pb.ModelStreamInferResponse] = []
        self._unread_tokens = 0

    def changed(self, buffer: AnswerBuffer) -> None:
        self._ready[buffer] = None
        self.wake_event.set()

    def unread(self, buffer: AnswerBuffer) -> None:
        self._unread_tokens += 1
        self.lag.check(self._unread_tokens)

    def refused(self, client_id: str, failure: Failure) -> None:
        self.first_failure = self.first_failure or failure
        self._errors.append(error_to_wire(failure, model=self._model, client_id=client_id))
        self.wake_event.set()
        self.lag.check(self._unread_tokens + len(self._errors))

    def take(self) -> list[pb.ModelStreamInferResponse]:
        ready, self._ready = self._ready, {}
        self._unread_tokens = 0
        out, self._errors = self._errors, []
        for buffer in ready:
            if buffer.failure is not None:
                self.first_failure = self.first_failure or buffer.failure
                out.append(error_to_wire(buffer.failure, model=self._model, client_id=buffer.client_id))
            elif (response := buffer.take()) is not None:
                out.append(pb.ModelStreamInferResponse(infer_response=response))
            if buffer.done:
                self.live.pop(buffer, None)
        return out


class OpenInferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, dispatcher: Dispatcher, not_serving_reason: Callable[[], str]) -> None:
        self._dispatcher = dispatcher
        self._not_serving_reason = not_serving_reason

    async def ServerLive(self, request: pb.ServerLiveRequest, context: grpc.aio.ServicerContext) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: grpc.aio.ServicerContext) -> Any:
        return pb.ServerReadyResponse(ready=not self._not_serving_reason())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: grpc.aio.ServicerContext) -> Any:
        known = request.name in self._dispatcher.model_names and request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=known and not self._not_serving_reason())

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: grpc.aio.ServicerContext) -> Any:
        return pb.ServerMetadataResponse(name="diptych", version=_SERVER_VERSION)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext) -> Any:
        check_model(request.name, request.version, self._dispatcher.model_names)
        return metadata_to_wire(request.name)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext) -> Any:
        wanted = wanted_from_wire(request, self._dispatcher.model_names)
        if wanted.stream:
            raise RequestRefused(
                Failure(
                    Code.INVALID_ARGUMENT,
                    "ModelInfer gives one response; call ModelStreamInfer, or set input 'stream' to false",
                    field="stream",
                )
            )
        sink = WholeAnswers(wanted.n)
        buffers = [AnswerBuffer(wanted, request.id, request.model_name, sink) for _ in range(wanted.n)]
        live: list[str] = []
        try:
            for number, buffer in enumerate(buffers):
                first = buffers[0].life
                raw = wanted.raw if first is None else another(wanted.raw, number, first.request)
                live.append(await self._submit(raw, buffer, context))
            await sink.over.wait()  # the request's deadline ends it, at the latest
        finally:
            for key in live:
                self._dispatcher.cancel(key)  # nothing to do if it ended; else the client left
        if sink.failure is not None:
            raise RequestRefused(sink.failure)
        return AnswerBuffer.all_of(buffers)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: grpc.aio.ServicerContext
    ) -> None:
        out = StreamAnswers(self._dispatcher.model_name, Lag(self._dispatcher.config.max_lag_tokens * _STREAM_LAG))
        status_wanted = (_STATUS_WANTED, "true") in (context.invocation_metadata() or ())
        admissions: set[asyncio.Task[None]] = set()
        reading = asyncio.create_task(self._read(request_iterator, out, admissions, context))
        reading.add_done_callback(lambda task: (out.wake_event.set(), task.cancelled() or task.exception()))
        try:
            while True:
                await out.wake_event.wait()
                out.wake_event.clear()
                for response in out.take():
                    if status_wanted and out.first_failure is not None:
                        raise RequestRefused(out.first_failure)
                    await context.write(response)
                if reading.done():
                    reading.result()  # raises RequestRefused for a message that could not be parsed
                    if not admissions and not out.live and not out.wake_event.is_set():
                        return
        except asyncio.CancelledError:
            if not out.lag.exceeded:
                raise
            await out.lag.abort(context)
        finally:
            reading.cancel()
            for task in list(admissions):
                task.cancel()
            for request_id in filter(None, list(out.live.values())):
                self._dispatcher.cancel(request_id)

    async def _read(
        self,
        requests: AsyncIterator[pb.ModelInferRequest],
        out: StreamAnswers,
        admissions: set[asyncio.Task[None]],
        context: grpc.aio.ServicerContext,
    ) -> None:
        def admitted(task: asyncio.Task[None]) -> None:
            admissions.discard(task)
            out.wake_event.set()

        async for request in requests:
            try:
                wanted = wanted_from_wire(request, self._dispatcher.model_names)
                if wanted.n > 1:
                    raise invalid("n", f"'n' is {wanted.n} in a ModelStreamInfer; call ModelInfer for several answers")
            except RequestRefused as error:
                out.refused(request.id, error.failure)
                continue
            if len(out.live) >= _MAX_LIVE_PER_STREAM:
                out.refused(
                    request.id,
                    Failure(
                        Code.RESOURCE_EXHAUSTED,
                        f"{_MAX_LIVE_PER_STREAM} requests are live on this stream; wait for some to end",
                        1000,
                    ),
                )
                continue
            buffer = AnswerBuffer(wanted, request.id, request.model_name, out)
            out.live[buffer] = ""
            task = asyncio.create_task(self._start(buffer, out, context))
            admissions.add(task)
            task.add_done_callback(admitted)

    async def _start(self, buffer: AnswerBuffer, out: StreamAnswers, context: grpc.aio.ServicerContext) -> None:
        try:
            request_id = await self._submit(buffer.wanted.raw, buffer, context)
        except RequestRefused as error:
            out.live.pop(buffer, None)
            out.refused(buffer.client_id, error.failure)
            return
        if buffer in out.live:
            out.live[buffer] = request_id

    async def _submit(self, raw: RawRequest, buffer: AnswerBuffer, context: grpc.aio.ServicerContext) -> str:
        return await self._dispatcher.submit(
            raw,
            buffer,
            grpc_deadline_s=context.time_remaining(),
            trace_context=trace_context_of(context),
        )
