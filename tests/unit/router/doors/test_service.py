from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from diptych.v1 import generate_pb2

from router.config import RouterConfig
from router.doors.grpc.buffers import CallBuffer, best
from router.doors.grpc.lenient import lenient
from router.doors.grpc.service import GenerateServicer
from router.doors.grpc.wire import request_from_wire
from router.errors import Code, Failure, RequestRefused
from router.prompt_logprobs import PromptLogprobs
from router.status import status_of


class Dispatcher:
    """Gives out the buffer of the one request that it is asked for."""

    def __init__(self) -> None:
        self.config = RouterConfig(max_lag_tokens=3)
        self.buffer: Any = None
        self.cancelled: list[str] = []

    async def submit(self, raw: Any, client: CallBuffer, **rest: Any) -> str:
        self.buffer = client
        client.token(0, 7, "a", None)
        client.wake()
        return "r"

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


class Aborted(grpc.aio.AbortError):
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
            await self._during_write()

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.trailing = metadata

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Aborted(code.name, details)


async def test_an_end_that_comes_during_a_write_is_written_too(monkeypatch: Any) -> None:
    dispatcher: Any = Dispatcher()
    end = generate_pb2.Finished(reason=generate_pb2.FINISH_REASON_LENGTH)
    monkeypatch.setattr("router.doors.grpc.buffers.finished_to_wire", lambda life, reason: end)

    async def finish() -> None:
        dispatcher.buffer.token(1, 8, "b", None)
        dispatcher.buffer.finished(SimpleNamespace(), None)
        dispatcher.buffer.wake()

    context: Any = Context(finish)
    await GenerateServicer(dispatcher).generate(generate_pb2.GenerateRequest(text="hi"), context)
    assert [r.WhichOneof("event") for r in context.written] == ["tokens", "tokens", "finished"]
    assert [list(r.tokens.token_ids) for r in context.written[:2]] == [[7], [8]]


async def test_a_client_that_does_not_read_is_told_that_it_was_cut_off() -> None:
    dispatcher: Any = Dispatcher()

    async def stuck() -> None:
        for position in range(1, 5):
            dispatcher.buffer.token(position, 9, "c", None)
        await asyncio.sleep(3600)

    context: Any = Context(stuck)
    with pytest.raises(Aborted, match="left 3 tokens or events unread and is cut off; read faster") as aborted:
        await GenerateServicer(dispatcher).generate(generate_pb2.GenerateRequest(text="hi"), context)
    assert aborted.value.args[0] == "RESOURCE_EXHAUSTED"
    assert "r" in dispatcher.cancelled


def test_a_status_always_fits_the_metadata_that_carries_it() -> None:
    status = status_of(Failure(Code.NOT_FOUND, "é" * 100_000, 1000, "model"))
    assert len(status.message.encode()) <= 1024
    assert status.message.endswith("é...")
    assert 3 * len(status.message.encode()) + status.ByteSize() * 4 / 3 < 8 << 10


def test_a_placement_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RequestRefused, match=r"placement 99 does not exist; use one of .*PLACEMENT_SPLIT"):
        request_from_wire(generate_pb2.GenerateRequest(text="hi", placement=99))  # type: ignore[arg-type]


def test_a_message_of_empty_elements_is_refused_before_it_is_parsed() -> None:
    parse = lenient(generate_pb2.SessionRequest.FromString, 1000)
    malformed = parse(b"\x0a\x00" * (1 << 20))
    assert malformed.failure.code is Code.INVALID_ARGUMENT
    assert "2097152 bytes, the limit is 1000 for prompts" in malformed.failure.message
    malformed = parse(b"\x0a\x00" * (1 << 18))
    assert "more than 32768 fields" in malformed.failure.message


def test_log_probabilities_of_a_prompt_come_once_before_the_tokens_whichever_answers_are_the_best() -> None:
    scores = PromptLogprobs(2, 1)
    scored = generate_pb2.PromptLogprobs(
        position=1, logprobs=[-1.0], ranks=[2], alternatives=1, top_token_ids=[9], top_logprobs=[-0.5]
    )
    assert scores.take(scored) == ""
    answers: list[Any] = [CallBuffer(SimpleNamespace(check=lambda tokens: None), number=i) for i in range(2)]  # type: ignore[arg-type]
    for i, answer in enumerate(answers):
        life: Any = SimpleNamespace(
            prompt_logprobs=None if i else scores, request=SimpleNamespace(prompt=[4, 5]), answered_tokens=1
        )
        answer.life = answer._scored = life
        answer._out.append(generate_pb2.GenerateResponse(started=generate_pb2.Started(), answer=i))
        answer.token(0, 7, "a", generate_pb2.TokenLogprobs(logprob=-2.0 + i))
    given = best(answers, 1)
    assert [r.WhichOneof("event") for r in given] == ["started", "prompt_logprobs", "tokens"]
    assert {r.answer for r in given} == {0}
    assert list(given[1].prompt_logprobs.token_ids) == [5]
