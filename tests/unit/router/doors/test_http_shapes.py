"""Answers as JSON, from what lives say of them. No sockets."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from router.breakdown import Breakdown
from router.doors.http.answer import Answer
from router.doors.http.errors import ApiError, of_failure
from router.doors.http.response_shape import ResponseShape
from router.doors.http.shapes import ChatShape, CompletionShape
from router.doors.http.tools import Reader
from router.errors import Code, Failure
from router.request import Finish
from router.text.tools.families import FAMILIES

LIFE: Any = SimpleNamespace(
    emitted=[1, 2, 3],
    request=SimpleNamespace(prompt=[1] * 7),
    cached_tokens=4,
    prompt_logprobs=None,
    breakdown=Breakdown(),
)
SAID = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def reader(parallel: bool = True) -> Reader:
    return Reader(FAMILIES["hermes"].parser(frozenset(["weather"])), parallel)


def chat(**more: Any) -> ChatShape:
    fields: Any = {"per_prompt": 1, "include_usage": False, "service_tier": None, "params": {}, **more}
    return ChatShape("r", "m", None, **fields)


@pytest.mark.parametrize("tools", [False, True])
async def test_a_stream_says_each_id_once(tools: bool) -> None:
    """Also of tokens whose text comes later, or never."""
    shape = chat(token_ids=True, reader=reader if tools else None)
    events = [e for e in streamed(shape, ["a", "", "b"]) if e != "[DONE]"]
    assert [e["prompt_token_ids"] for e in events if "prompt_token_ids" in e] == [[1] * 7]
    ids = [t for e in events for t in e["choices"][0].get("token_ids", [])]
    assert ids == LIFE.emitted
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == "ab"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


class Wire:
    """A connection that keeps what is written."""

    write_paused = False

    def __init__(self) -> None:
        self.said = ""

    def write_chunk(self, data: bytes) -> None:
        assert data, "it would end the response"
        self.said += data.decode()


def streamed(shape: Any, pieces: list[str], reason: Finish = Finish.STOP) -> list[Any]:
    answer, wire = Answer(shape, 1, True, 100), Wire()
    (choice,) = answer.choices
    choice.started(LIFE)
    answer.open(wire)  # type: ignore[arg-type]
    for i, piece in enumerate(pieces):
        choice.token(i, i, piece, None)
        choice.wake()
    choice.finished(LIFE, reason)
    assert answer.over
    said = wire.said + answer.rest() + shape.end(answer.choices)
    data = [line[6:] for line in said.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in data]


async def test_a_stream_is_the_text_and_its_end() -> None:
    text = ["Grüße, ", "\u2028\u0085", "", '"\\\n', "😀"]
    events = streamed(chat(include_usage=True), text)
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-2]) == "".join(text)
    assert events[-3]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_calls_are_read_out_of_a_stream_however_it_is_cut(size: int) -> None:
    pieces = [SAID[i : i + size] for i in range(0, len(SAID), size)]
    events = streamed(chat(reader=reader), pieces)
    deltas = [e["choices"][0]["delta"] for e in events[:-1]]
    assert "".join(d.get("content", "") for d in deltas).strip() == "Let me see."
    calls = [c for d in deltas for c in d.get("tool_calls", [])]
    assert calls[0]["id"].startswith("call_")
    assert (calls[0]["type"], calls[0]["function"]["name"]) == ("function", "weather")
    assert {c["index"] for c in calls} == {0}
    assert json.loads("".join(c["function"]["arguments"] for c in calls)) == {"city": "Bern"}
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_without_parallel_calls_the_first_is_given() -> None:
    events = streamed(chat(reader=lambda: reader(parallel=False)), [SAID, "\n", SAID])
    calls = [c for e in events[:-1] for c in e["choices"][0]["delta"].get("tool_calls", [])]
    assert [c["function"].get("name") for c in calls if "id" in c] == ["weather"]


async def test_a_whole_answer_with_calls() -> None:
    shape = chat(reader=reader)
    answer = Answer(shape, 1, False, 100)
    (choice,) = answer.choices
    choice.started(LIFE)
    choice.token(0, 1, SAID, None)
    choice.finished(LIFE, Finish.STOP)
    (said,) = shape.whole(answer.choices)["choices"]
    (call,) = said["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}
    assert said["finish_reason"] == "tool_calls"


async def test_a_response_stream_has_items_in_order() -> None:
    shape = ResponseShape("r", "m", None, echoed={"tools": []}, params={}, reader=reader)
    events = streamed(shape, [SAID[:20], SAID[20:]])
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    kinds = [e["type"].removeprefix("response.") for e in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 2
    assert kinds[-1] == "completed"
    message, call = events[-1]["response"]["output"]
    assert message["content"][0]["text"].strip() == "Let me see."
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "weather", {"city": "Bern"})
    done = next(e for e in events if e["type"] == "response.function_call_arguments.done")
    assert done["arguments"] == call["arguments"]


async def test_a_response_without_text_has_an_empty_message() -> None:
    events = streamed(ResponseShape("r", "m", None, echoed={}, params={}), [], Finish.LENGTH)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_tokens_that_come_while_the_client_lags_leave_together() -> None:
    shape = CompletionShape("r", "m", None, per_prompt=1, include_usage=False, echo=None, params={})
    answer, wire = Answer(shape, 1, True, 4), Wire()
    (choice,) = answer.choices
    choice.started(LIFE)
    answer.open(wire)  # type: ignore[arg-type]
    wire.write_paused = True
    for i in range(3):
        choice.token(i, i, f"{i} ", None)
        choice.wake()
    assert wire.said == ""
    wire.write_paused = False
    answer.writable()
    assert wire.said.count("data: ") == 1
    assert '"text":"0 1 2 "' in wire.said
    wire.write_paused = True
    for i in range(4):
        choice.token(3 + i, i, "x", None)
        choice.wake()
    assert answer.over
    assert answer.failure is not None
    assert answer.failure.code is Code.RESOURCE_EXHAUSTED


def test_failures_have_the_status_that_clients_act_on() -> None:
    busy = of_failure(Failure(Code.RESOURCE_EXHAUSTED, "full", 1200))
    assert busy.status == 429
    assert dict(busy.headers()) == {b"retry-after": b"2", b"retry-after-ms": b"1200"}
    late = of_failure(Failure(Code.DEADLINE_EXCEEDED, "late"))
    assert (late.status, late.headers()) == (504, [(b"x-should-retry", b"false")])
    assert of_failure(Failure(Code.INVALID_ARGUMENT, "no", field="chat"), {"chat": "messages"}).param == "messages"
    assert ApiError(400, "no").headers() == []


async def test_logprobs_of_a_response_with_tools_come_once_with_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.doors.http.response_shape.chat_logprobs", lambda entries, _: {"content": list(entries)})
    names: Any = object()
    for size in (1, 7):
        shape = ResponseShape("r", "m", names, echoed={}, params={}, reader=reader)
        answer = Answer(shape, 1, False, 1000)
        (choice,) = answer.choices
        choice.started(LIFE)
        for i in range(0, len(SAID), size):
            shape.delta(choice, SAID[i : i + size], [i])  # type: ignore[list-item]
        choice.finished(LIFE, Finish.STOP)
        shape.finish(choice)
        message, call = shape._items
        seen: list[Any] = list(message.logprobs)
        assert seen == [i for i in range(0, len(SAID), size) if i < len(message.text)]
        assert not call.logprobs
    shape = ResponseShape("r", "m", names, echoed={}, params={}, reader=reader)
    shape.delta(choice, "Well", [1])  # type: ignore[list-item]
    shape.delta(choice, "", [2])  # type: ignore[list-item]
    shape.finish(choice)
    assert list(shape._items[0].logprobs) == [1, 2], "the end token's too"


async def test_a_whole_response_writes_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr("router.doors.http.response_shape.to_json", lambda value: written.append(value) or b"")
    monkeypatch.setattr("router.doors.http.response_shape.chat_logprobs", lambda entries, _: {"content": list(entries)})
    names: Any = object()
    shape = ResponseShape("r", "m", names, echoed={}, params={}, reader=reader)
    (choice,) = Answer(shape, 1, False, 1000).choices
    choice.started(LIFE)
    choice.token(0, 1, SAID, SimpleNamespace(logprob=-1.0, top=()))
    choice.finished(LIFE, Finish.STOP)
    message, call = shape.whole([choice])["output"]
    assert (message["status"], message["content"][0]["text"].strip(), call["name"]) == (
        "completed", "Let me see.", "weather",
    )  # fmt: skip
    assert len(message["content"][0]["logprobs"]) == 1
    assert written == []


def test_errors_have_words_for_programs() -> None:
    wide = Failure(Code.INVALID_ARGUMENT, "too long", field="prompt", reason="context_length_exceeded")
    told = of_failure(wide, {"prompt": "messages"})
    assert told.code == "context_length_exceeded"
    # What litellm and LangChain look for, in the message.
    assert told.message == "this model's maximum context length is exceeded (context_length_exceeded): too long"
    assert of_failure(Failure(Code.INVALID_ARGUMENT, "no", field="seed")).code == "invalid_value"
    inner = Failure(Code.INVALID_ARGUMENT, "the lark of `structured` cannot be used: it is long", field="structured")
    params = {"structured": "tools", "structured_words": "schemas of `tools`"}
    assert of_failure(inner, params).message == "the schemas of `tools` cannot be used: it is long"
    by_name = of_failure(inner, {"structured": "response_format"})
    assert by_name.message == "the format of `response_format` cannot be used: it is long"
    later = Failure(Code.INVALID_ARGUMENT, "the grammar of `structured` cannot go on", field="structured")
    told = of_failure(later, {"structured": "response_format", "structured_code": "invalid_json_schema"})
    assert (told.param, told.code) == ("response_format", "invalid_json_schema")
    assert [ApiError(status, "no").code for status in (400, 408, 413, 429, 431)] == [
        "invalid_value",
        "request_timeout",
        "request_too_large",
        "rate_limit_exceeded",
        "headers_too_large",
    ]
