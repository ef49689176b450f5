"""The client for asyncio. What to do next is decided in _answering.py; here are the calls and the waits."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Self, Unpack

import grpc

from diptych.client._answering import Answering, RetryBudget, request_of
from diptych.client._grpc import OPTIONS, Metadata, metadata_of, trouble_of
from diptych.client._routers import Routers, addresses_of
from diptych.client.types import Answer, Chunk, Options, Prompt, RequestFailed, Retrying
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2, generate_pb2_grpc

_POLL_S = 0.1


class AsyncClient:
    """Requests to one router or several, from one event loop. Arguments as Client's."""

    def __init__(
        self,
        target: str | Sequence[str] = "localhost:8100",
        *,
        timeout_s: float = 300.0,
        retrying: Retrying = Retrying(),  # noqa: B008
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str = "",
        metadata: Metadata = (),
    ) -> None:
        self._channels = [
            grpc.aio.insecure_channel(address, OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, OPTIONS)
            for address in addresses_of(target)
        ]
        self._generate: list[Any] = [generate_pb2_grpc.GenerateServiceStub(c).Generate for c in self._channels]
        self._cluster: list[Any] = [cluster_pb2_grpc.ClusterServiceStub(c).GetCluster for c in self._channels]
        self._routers = Routers(len(self._channels), random.Random())
        self._timeout_s = timeout_s
        self._retrying = retrying
        self._budget = RetryBudget(retrying)
        self._metadata = metadata_of(metadata, api_key)
        self._closed = False

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """The answer chunk by chunk. The request is sent when the first chunk is asked for."""
        answering = Answering(
            request_of(prompt, options),
            options.get("timeout_s", self._timeout_s),
            self._retrying,
            self._budget,
            random.Random(),
            time.monotonic(),
        )
        return AsyncStream(answering, self._call, self._routers)

    def _call(self, router: int, request: generate_pb2.GenerateRequest, timeout_s: float) -> Any:
        if self._closed:
            raise RequestFailed("CANCELLED", "this client was closed; make another", Answer())
        return self._generate[router](request, timeout=timeout_s, metadata=self._metadata)

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer. Raises RequestFailed. Cancelling the task cancels the request."""
        async with self.stream(prompt, **options) as stream:
            async for _ in stream:
                pass
            return stream.answer

    async def cluster(self, timeout_s: float = 5.0) -> cluster_pb2.Cluster:
        """Router, workers and recent requests, as one router sees them. Raises RequestFailed."""
        elsewhere = True
        while True:
            router, trouble = self._routers.take(time.monotonic()), None
            try:
                request = cluster_pb2.GetClusterRequest()
                return (await self._cluster[router](request, timeout=timeout_s, metadata=self._metadata)).cluster
            except grpc.RpcError as error:
                trouble = trouble_of(error)
            finally:
                elsewhere = self._routers.give_back(router, trouble, time.monotonic())
            if trouble is not None and not elsewhere:
                raise RequestFailed(trouble.code, trouble.message, Answer())

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Until a request would be answered. Raises TimeoutError with the reason."""
        deadline = time.monotonic() + timeout_s
        while reason := await self._not_ready():
            if time.monotonic() >= deadline:
                raise TimeoutError(f"not ready within {timeout_s:g} s: {reason}")
            await asyncio.sleep(_POLL_S)

    async def _not_ready(self) -> str:
        try:
            return (await self.cluster(2.0)).router.not_serving_reason
        except RequestFailed as error:
            return str(error)

    async def close(self) -> None:
        """Live streams end with an error."""
        self._closed = True
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncStream(AsyncIterator[Chunk]):
    """One answer. Iterate once; leave the `async with` block, call `cancel`, or cancel the task, to give it up."""

    def __init__(self, answering: Answering, call: Callable[[int, Any, float], Any], routers: Routers) -> None:
        self._answering = answering
        self._routers = routers
        self._open = call
        self._call: Any = None
        self._cancelled = asyncio.Event()
        self._chunks = self._run()

    @property
    def answer(self) -> Answer:
        """What has come so far."""
        return self._answering.answer

    def cancel(self) -> None:
        """The workers stop and free the request's memory; the iteration ends."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def _run(self) -> AsyncGenerator[Chunk, None]:
        answering = self._answering
        while not answering.done:
            request, timeout_s = answering.attempt(time.monotonic())
            router, trouble = self._routers.take(time.monotonic()), None
            elsewhere, call = False, None
            try:
                call = self._call = self._open(router, request, timeout_s)
                if self._cancelled.is_set():
                    break
                async for response in call:
                    chunk = answering.hear(response)
                    if chunk is not None:
                        yield chunk
                trouble = answering.ended()
            except grpc.RpcError as error:
                trouble = trouble_of(error)
            except asyncio.CancelledError:
                if not self._cancelled.is_set():
                    raise  # the task's own
                break
            finally:
                if call is not None:
                    call.cancel()  # nothing to do if it ended
                elsewhere = self._routers.give_back(router, trouble, time.monotonic())
            if answering.done or self._cancelled.is_set():
                break
            assert trouble is not None
            delay_s = answering.trouble(trouble, time.monotonic(), elsewhere=elsewhere)
            try:
                async with asyncio.timeout(delay_s):
                    await self._cancelled.wait()
                break
            except TimeoutError:
                pass
        if not answering.done:
            self.answer.finish_reason = "cancelled"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._answering.done:
            self.cancel()
            self.answer.finish_reason = "cancelled"
        await self._chunks.aclose()
