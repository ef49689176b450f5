"""The client for threads. What to do next is decided in _answering.py; here are the calls and the waits."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Self, Unpack

import grpc

from diptych.client._answering import Answering, RetryBudget, request_of
from diptych.client._grpc import OPTIONS, Metadata, metadata_of, trouble_of
from diptych.client._routers import Routers, addresses_of
from diptych.client.types import Answer, Chunk, Options, Prompt, RequestFailed, Retrying
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2, generate_pb2_grpc

_POLL_S = 0.1


class Client:
    """Requests to one router, or to several of one cluster, from any number of threads.

    target       host:port, or any gRPC name; "a:8100,b:8100" or a list: calls are spread over them, and what one
                 cannot do goes on at another
    timeout_s    of a whole answer, where a request names none
    retrying     see Retrying; NO_RETRIES turns it off
    credentials  for TLS; None is plain text
    api_key      where the router asks for one; wants TLS, or a network that nobody reads along
    metadata     sent with every call
    """

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
            grpc.insecure_channel(address, OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, OPTIONS)
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

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """The answer chunk by chunk. The request is sent when the first chunk is asked for."""
        answering = Answering(
            request_of(prompt, options),
            options.get("timeout_s", self._timeout_s),
            self._retrying,
            self._budget,
            random.Random(),
            time.monotonic(),
        )
        return Stream(answering, self._call, self._routers)

    def _call(self, router: int, request: generate_pb2.GenerateRequest, timeout_s: float) -> Any:
        if self._closed:
            raise RequestFailed("CANCELLED", "this client was closed; make another", Answer())
        return self._generate[router](request, timeout=timeout_s, metadata=self._metadata)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer. Raises RequestFailed."""
        with self.stream(prompt, **options) as stream:
            for _ in stream:
                pass
            return stream.answer

    def cluster(self, timeout_s: float = 5.0) -> cluster_pb2.Cluster:
        """Router, workers and recent requests, as one router sees them. Raises RequestFailed."""
        elsewhere = True
        while True:
            router, trouble = self._routers.take(time.monotonic()), None
            try:
                request = cluster_pb2.GetClusterRequest()
                return self._cluster[router](request, timeout=timeout_s, metadata=self._metadata).cluster
            except grpc.RpcError as error:
                trouble = trouble_of(error)
            finally:
                elsewhere = self._routers.give_back(router, trouble, time.monotonic())
            if trouble is not None and not elsewhere:
                raise RequestFailed(trouble.code, trouble.message, Answer())

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Until a request would be answered. Raises TimeoutError with the reason."""
        deadline = time.monotonic() + timeout_s
        while reason := self._not_ready():
            if time.monotonic() >= deadline:
                raise TimeoutError(f"not ready within {timeout_s:g} s: {reason}")
            time.sleep(_POLL_S)

    def _not_ready(self) -> str:
        try:
            return self.cluster(2.0).router.not_serving_reason
        except RequestFailed as error:
            return str(error)

    def close(self) -> None:
        """Live streams end with an error."""
        self._closed = True
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(Iterator[Chunk]):
    """One answer. Iterate once; leave the `with` block, or call `cancel` from any thread, to give it up."""

    def __init__(self, answering: Answering, call: Callable[[int, Any, float], Any], routers: Routers) -> None:
        self._answering = answering
        self._routers = routers
        self._open = call
        self._call: Any = None
        self._cancelled = threading.Event()
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

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def _run(self) -> Generator[Chunk, None, None]:
        answering = self._answering
        while not answering.done:
            request, timeout_s = answering.attempt(time.monotonic())
            router, trouble = self._routers.take(time.monotonic()), None
            elsewhere, call = False, None
            try:
                call = self._call = self._open(router, request, timeout_s)
                if self._cancelled.is_set():
                    break
                for response in call:
                    chunk = answering.hear(response)
                    if chunk is not None:
                        yield chunk
                trouble = answering.ended()
            except grpc.RpcError as error:
                trouble = trouble_of(error)
            finally:
                if call is not None:
                    call.cancel()  # nothing to do if it ended
                elsewhere = self._routers.give_back(router, trouble, time.monotonic())
            if answering.done or self._cancelled.is_set():
                break
            assert trouble is not None
            if self._cancelled.wait(answering.trouble(trouble, time.monotonic(), elsewhere=elsewhere)):
                break
        if not answering.done:
            self.answer.finish_reason = "cancelled"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._answering.done:
            self.cancel()
            self.answer.finish_reason = "cancelled"
        self._chunks.close()
