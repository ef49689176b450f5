from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diptych.v1 import generate_pb2

from router.config import RouterConfig
from router.service import CallBuffer, GenerateServicer


class Dispatcher:
    """Gives out the buffer of the one request that it is asked for."""

    def __init__(self) -> None:
        self.config = RouterConfig()
        self.buffer: Any = None

    async def submit(self, raw: Any, client: CallBuffer, **rest: Any) -> str:
        self.buffer = client
        client.token(0, 7, "a", None)
        client.wake()
        return "r"

    def cancel(self, request_id: str) -> None:
        pass


class Context:
    """A client's end; `during_write` happens while a message is on its way out."""

    def __init__(self, during_write: Any) -> None:
        self.written: list[generate_pb2.GenerateResponse] = []
        self._during_write = during_write

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, response: generate_pb2.GenerateResponse) -> None:
        self.written.append(response)
        if len(self.written) == 1:
            self._during_write()


async def test_an_end_that_comes_during_a_write_is_written_too(monkeypatch: Any) -> None:
    dispatcher: Any = Dispatcher()
    end = generate_pb2.Finished(reason=generate_pb2.FINISH_REASON_LENGTH)
    monkeypatch.setattr("router.service.finished_to_wire", lambda life, reason: end)

    def finish() -> None:
        dispatcher.buffer.token(1, 8, "b", None)
        dispatcher.buffer.finished(SimpleNamespace(), None)
        dispatcher.buffer.wake()

    context: Any = Context(finish)
    await GenerateServicer(dispatcher).generate(generate_pb2.GenerateRequest(text="hi"), context)
    assert [r.WhichOneof("event") for r in context.written] == ["tokens", "tokens", "finished"]
    assert [list(r.tokens.token_ids) for r in context.written[:2]] == [[7], [8]]
