"""A real router on real sockets in this process, with a fake decode worker, on an event loop in a thread of its own.

The tests' clients run on threads of gRPC, so that a router whose loop is stuck is seen and does not stick the test.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
from diptych.v1 import generate_pb2, worker_pb2_grpc

from router.config import RouterConfig
from router.server import RunningRouter, serve
from tests.support.fake_worker import FakeWorker
from worker.clients import Registration, WorkerCard

T = TypeVar("T")

GENERATE = "/diptych.v1.GenerateService/Generate"
SESSION = "/diptych.v1.GenerateService/Session"
VOCABULARY, CONTEXT_LIMIT = 49152, 8192
GOOD = generate_pb2.GenerateRequest(
    token_ids=generate_pb2.TokenIds(ids=[1, 2, 3]), sampling=generate_pb2.SamplingParams(max_tokens=2)
)


class InProcessRouter:
    """`close()` at the end. `public` and `internal` are channels; calls on them may carry any bytes."""

    def __init__(
        self,
        config: RouterConfig,
        token_period_s: float = 0.001,
        total_blocks: int = 1 << 20,
        vocab_size: int = VOCABULARY,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="router", daemon=True)
        self._thread.start()
        self.router: RunningRouter = self.on_loop(self._start(config, token_period_s, total_blocks, vocab_size), 60.0)
        options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", -1)]
        self.public = grpc.insecure_channel(f"127.0.0.1:{self.router.port}", options=options)
        self.internal = grpc.insecure_channel(f"127.0.0.1:{self.router.internal_port}")
        self._generate = self.public.unary_stream(
            GENERATE,
            request_serializer=generate_pb2.GenerateRequest.SerializeToString,
            response_deserializer=generate_pb2.GenerateResponse.FromString,
        )

    async def _start(
        self, config: RouterConfig, token_period_s: float, total_blocks: int, vocab_size: int
    ) -> RunningRouter:
        router = await serve(config)
        epoch = time.time_ns()
        self._worker = grpc.aio.server(
            options=[("grpc.http2.min_recv_ping_interval_without_data_ms", 500), ("grpc.http2.max_ping_strikes", 0)]
        )
        self.worker = FakeWorker(epoch, token_period_s)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self.worker, self._worker)
        port = self._worker.add_insecure_port("127.0.0.1:0")
        await self._worker.start()
        card = WorkerCard(
            worker_id="fake",
            epoch=epoch,
            role="decode",
            address=f"127.0.0.1:{port}",
            model=router.dispatcher.model_name,
            layout_fingerprint="fake",
            block_tokens=32,
            block_bytes=1,
            total_blocks=total_blocks,
            context_limit_tokens=CONTEXT_LIMIT,
            vocab_size=vocab_size,
            transport="fake",
            attention_backend="fake",
            device="fake",
        )
        self._registration = Registration(card, lambda: [f"127.0.0.1:{router.internal_port}"])
        self._registration.start()
        await router.wait_ready(10.0)
        return router

    def on_loop(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Raises TimeoutError when the loop is stuck."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def answers(self, timeout_s: float = 10.0) -> None:
        """A good request gets its answer."""
        responses = list(self._generate(GOOD, timeout=timeout_s))
        kinds = [r.WhichOneof("event") for r in responses]
        assert kinds[0] == "started"
        assert kinds[-1] == "finished"
        assert sum(len(r.tokens.token_ids) for r in responses) == 2

    def becomes_empty(self, timeout_s: float = 10.0) -> None:
        """No request is live and nothing of any is left."""

        async def wait() -> None:
            dispatcher = self.router.dispatcher
            deadline = time.monotonic() + timeout_s
            while dispatcher.live_requests and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            dispatcher.check_empty()

        self.on_loop(wait(), timeout_s + 5.0)

    def close(self) -> None:
        async def stop() -> None:
            await self._registration.stop()
            await self.router.stop()
            await self._worker.stop(grace=0.2)

        self.public.close()
        self.internal.close()
        self.on_loop(stop(), 30.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()
