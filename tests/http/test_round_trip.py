"""What the official SDK makes of our answers is taken back as history, whatever way it was written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from pydantic import BaseModel

from router.breakdown import Breakdown
from router.doors.http.answer import Answer
from router.doors.http.response_shape import ResponseShape
from router.doors.http.shapes import ChatShape
from router.doors.http.tools import Reader
from router.request import Finish
from router.text.tools.families import FAMILIES
from tests.support.raw_http import Http

CHAT, RESPONSES, MODEL = "/v1/chat/completions", "/v1/responses", "smollm2-135m-instruct"
LIFE: Any = SimpleNamespace(
    emitted=[1, 2, 3],
    request=SimpleNamespace(prompt=[1] * 7),
    cached_tokens=4,
    prompt_logprobs=None,
    breakdown=Breakdown(),
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SAID = {  # what a model writes, and why it ended
    "text": ("The sky is blue.", Finish.STOP),
    "nothing": ("", Finish.STOP),
    "cut": ("The sky is", Finish.LENGTH),
    "json": ('{"color": "blue"}', Finish.STOP),
    "call": (CALL, Finish.STOP),
    "text and calls": (f"Let me see.\n{CALL}\n{CALL}", Finish.STOP),
    "call cut": (CALL[:-20], Finish.LENGTH),
    "call without arguments": ('<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>', Finish.STOP),
}


class Sky(BaseModel):
    color: str


def of_our_shape(shape: Any, said: str, reason: Finish, stream: bool) -> bytes:
    answer = Answer(shape, 1, stream, 1000)
    (choice,) = answer.choices
    choice.started(LIFE)
    choice.token(0, 1, said, None)
    choice.finished(LIFE, reason)
    if stream:
        return (answer.rest() + shape.end(answer.choices)).encode()
    return json.dumps(shape.whole(answer.choices)).encode()


class Scripted(httpx2.AsyncBaseTransport):
    """A server that says one thing, in our own shapes."""

    def __init__(self, name: str) -> None:
        self._said, self._reason = SAID[name]

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        asked = json.loads(await request.aread())

        def reader() -> Reader:
            return Reader(FAMILIES["hermes"].parser(frozenset(["weather"])), True)

        shape: Any
        if request.url.path == RESPONSES:
            echoed: Any = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "metadata": {}}
            shape = ResponseShape("r", MODEL, None, echoed=echoed, params={}, reader=reader)
        else:
            more: Any = {"per_prompt": 1, "include_usage": False, "service_tier": None, "params": {}, "reader": reader}
            shape = ChatShape("r", MODEL, None, **more)
        stream = bool(asked.get("stream"))
        body = of_our_shape(shape, self._said, self._reason, stream)
        kind = "text/event-stream" if stream else "application/json"
        return httpx2.Response(200, headers={"content-type": kind}, content=body)


def client(name: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://scripted/v1", api_key="none", http_client=httpx2.AsyncClient(transport=Scripted(name))
    )


DUMPS: dict[str, Callable[[Any], Any]] = {
    "model_dump": lambda m: m.model_dump(),
    "json": lambda m: m.model_dump(mode="json"),
    "exclude_none": lambda m: m.model_dump(exclude_none=True),
    "exclude_unset": lambda m: m.model_dump(exclude_unset=True),
    "by_alias": lambda m: m.model_dump(by_alias=True),
    "to_dict": lambda m: m.to_dict(),
    "as sent": lambda m: json.loads(m.model_dump_json()),
}


async def chat_answers(name: str) -> list[Any]:
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    async with client(name) as sdk:
        found: list[Any] = [(await sdk.chat.completions.create(**asked)).choices[0].message]
        async with sdk.chat.completions.stream(**asked) as stream:
            found.append(await final_message(stream))
        if name == "json":
            found.append((await sdk.chat.completions.parse(**asked, response_format=Sky)).choices[0].message)
        if "call" in name and name != "call cut":
            found.append((await sdk.chat.completions.parse(**asked, tools=[TOOL])).choices[0].message)
            async with sdk.chat.completions.stream(**asked, tools=[TOOL]) as stream:
                found.append(await final_message(stream))
    return found


async def final_message(stream: Any) -> Any:
    try:
        completion = await stream.get_final_completion()
    except openai.LengthFinishReasonError as cut:
        completion = cut.completion
    return completion.choices[0].message


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the SDK's own, of `parsed`
@pytest.mark.parametrize("name", SAID)
async def test_a_chat_answer_is_taken_back(http: Http, name: str) -> None:
    for message in await chat_answers(name):
        for how, dump in DUMPS.items():
            written = dump(message)
            calls = [c["id"] for c in written.get("tool_calls") or ()]
            assert bool(calls) == ("call" in name)
            messages = [
                {"role": "user", "content": "hi"},
                written,
                *({"role": "tool", "tool_call_id": c, "content": "sunny"} for c in calls),
                {"role": "user", "content": "and now?"},
            ]
            body = {"model": MODEL, "messages": messages, "max_tokens": 1, **({"tools": [TOOL]} if calls else {})}
            answer = http.post(CHAT, body)
            assert answer.status == 200, (how, written, answer.body)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the SDK's own, of `parsed`
@pytest.mark.parametrize("name", SAID)
async def test_a_response_is_taken_back(http: Http, name: str) -> None:
    asked: Any = {"model": MODEL, "input": "hi"}
    async with client(name) as sdk:
        found: list[Any] = [await sdk.responses.create(**asked)]
        async with sdk.responses.stream(**asked) as stream:
            async for event in stream:
                if event.type in ("response.completed", "response.incomplete"):
                    found.append(event.response)
        if name == "json":
            found.append(await sdk.responses.parse(**asked, text_format=Sky))
    assert len(found) >= 2
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": None}
    counts = set()
    for response in found:
        for how, dump in DUMPS.items():
            items = [dump(item) for item in response.output]
            calls = [item["call_id"] for item in items if item["type"] == "function_call"]
            assert bool(calls) == ("call" in name)
            given = [
                {"role": "user", "content": "hi"},
                reasoning,
                *items,
                *({"type": "function_call_output", "call_id": c, "output": "sunny"} for c in calls),
                {"role": "user", "content": "and now?"},
            ]
            answer = http.post(RESPONSES, {"model": MODEL, "input": given, "max_output_tokens": 1})
            assert answer.status == 200, (how, items, answer.body)
            counts.add(answer.json["usage"]["input_tokens"])
    assert len(counts) == 1, "however it is written down, it is the same prompt"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "refusal": "No.", "annotations": None, "audio": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "No."}]},
        {"role": "assistant", "content": "No.", "metadata": {"title": None}, "options": []},
        {"role": "assistant", "content": "No.", "reasoning_content": "Hm.", "reasoning": None, "reasoning_details": []},
        {"role": "assistant", "content": "No.", "tool_calls": [], "function_call": None, "prefix": False},
        {"role": "assistant", "content": "No.", "name": None, "tool_call_id": None, "index": 0, "id": "x"},
    ],
)
def test_an_answer_with_fields_of_others_is_the_same_prompt(http: Http, message: dict[str, Any]) -> None:
    def tokens(said: dict[str, Any]) -> Any:
        answer = http.post("/tokenize", {"messages": [{"role": "user", "content": "hi", "x": None}, said]})
        assert answer.status == 200, answer.body
        return answer.json["tokens"]

    assert tokens(message) == tokens({"role": "assistant", "content": "No."})


@pytest.mark.parametrize("arguments", ["{}", "null", "", None, {}])
def test_no_arguments_are_no_arguments(http: Http, arguments: Any) -> None:
    def ask(arguments: Any) -> Any:
        call = {"index": 0, "id": None, "type": None, "function": {"name": "weather", "arguments": arguments, "x": 1}}
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        return http.post("/tokenize", {"messages": messages, "tools": [TOOL]}).json["tokens"]

    assert ask(arguments) == ask("{}")
