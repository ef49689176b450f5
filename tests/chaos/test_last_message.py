"""An answer that ends while its writer is held up still reaches the client whole."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from diptych.v1 import generate_pb2

from router.breakdown import Breakdown
from router.doors.grpc.buffers import CallBuffer
from router.doors.grpc.service import GenerateServicer
from router.placement.policy import Route, WorkerKey
from router.request import Finish


class SlowContext:
    """A client whose first message takes a while to leave; meanwhile the answer ends."""

    def __init__(self) -> None:
        self.written: list[generate_pb2.GenerateResponse] = []
        self.meanwhile: Any = None

    def time_remaining(self) -> float:
        return 10.0

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, message: generate_pb2.GenerateResponse) -> None:
        await asyncio.sleep(0)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        self.written.append(message)


async def test_an_answer_that_ends_during_a_write_is_sent_whole() -> None:
    context = SlowContext()
    life: Any = SimpleNamespace(
        request=SimpleNamespace(prompt=[1], arrived=0.0),
        route=Route(WorkerKey("decode-0", 1), None, "short_on_decode", {}),
        emitted=[7, 8],
        cached_tokens=0,
        recoveries=0,
        kv_early_share=0.0,
        adopt_ms=0.0,
        breakdown=Breakdown(),
        times=SimpleNamespace(dispatched=0.0, first_token=0.1, second_token=0.2, last_token=0.2, ended=0.2),
    )

    async def submit(raw: Any, client: CallBuffer, **_: Any) -> str:
        def end() -> None:
            client.token(1, 8, "b", None)
            client.finished(life, Finish.LENGTH)
            client.wake()

        client.token(0, 7, "a", None)
        client.wake()
        context.meanwhile = end
        return "request"

    dispatcher: Any = SimpleNamespace(
        config=SimpleNamespace(max_lag_tokens=100), submit=submit, cancel=lambda request_id: None
    )
    request = generate_pb2.GenerateRequest(text="hello")
    async with asyncio.timeout(5):
        await GenerateServicer(dispatcher).generate(request, context)  # type: ignore[arg-type]
    kinds = [m.WhichOneof("event") for m in context.written]
    assert kinds == ["tokens", "tokens", "finished"]
