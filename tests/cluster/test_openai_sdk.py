"""The `openai` package, unmodified, against a real cluster: the answers are those that gRPC gives."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from diptych.v1 import generate_pb2

from tests.support.processes import Cluster
from tests.support.prompts import text_of, tokens_of

MODEL = "smollm2-135m-instruct"
SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
NAMES = {SPLIT: "split", LOCAL: "local"}
MESSAGES: Any = [
    {"role": "developer", "content": "You are brief."},
    {"role": "user", "content": [{"type": "text", "text": "Why is "}, {"type": "text", "text": "the sky blue?"}]},
]


def url(cluster: Cluster) -> str:
    return f"http://127.0.0.1:{cluster.http_port}/v1"


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url(cluster), api_key="none", max_retries=0, timeout=60.0) as client:
        yield client


def over_grpc(cluster: Cluster, sampling: generate_pb2.SamplingParams, placement: int) -> Any:
    request = generate_pb2.GenerateRequest(sampling=sampling, placement=placement)
    request.chat.messages.add(role="system", content="You are brief.")
    request.chat.messages.add(role="user", content="Why is the sky blue?")
    return cluster.ask(request)


SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "presence_penalty": 0.3, "frequency_penalty": 0.2}


@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
@pytest.mark.parametrize("fields", [{"temperature": 0.0}, SAMPLED])
def test_chat_says_what_grpc_says(
    cluster: Cluster, client: openai.OpenAI, placement: int, fields: dict[str, Any]
) -> None:
    expected = over_grpc(cluster, generate_pb2.SamplingParams(max_tokens=20, **fields), placement)
    headers = {"x-diptych-placement": NAMES[placement]}
    whole = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=20, extra_headers=headers, **fields
    )
    assert whole.choices[0].message.content == expected.text
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == expected.finished.usage.prompt_tokens
    assert whole.usage.completion_tokens == len(expected.token_ids)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers=headers,
        **fields,
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_answers_of_one_request_are_those_of_its_seeds(cluster: Cluster, client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 1.0}
    several = client.chat.completions.create(n=3, seed=7, **fields)
    singles = [client.chat.completions.create(seed=7 + i, **fields) for i in range(3)]
    assert [c.message.content for c in several.choices] == [s.choices[0].message.content for s in singles]
    assert len({c.message.content for c in several.choices}) > 1
    assert several.usage is not None
    assert several.usage.completion_tokens == sum(s.usage.completion_tokens for s in singles if s.usage)
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(n=3, seed=7, stream=True, **fields):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == [c.message.content for c in several.choices]


@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
def test_completions_of_tokens_text_and_batches(
    cluster: Cluster, client: openai.OpenAI, tokenizer: Any, placement: int
) -> None:
    prompts = [tokens_of(tokenizer, length, seed=length) for length in (40, 300)]
    sampling = generate_pb2.SamplingParams(max_tokens=8)
    expected = [cluster.ask(cluster.request(p, sampling, placement)).text for p in prompts]
    headers = {"x-diptych-placement": NAMES[placement]}
    fields: Any = {"model": MODEL, "max_tokens": 8, "temperature": 0.0, "extra_headers": headers}
    assert [c.text for c in client.completions.create(prompt=prompts, **fields).choices] == expected
    texts = ["", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **fields):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    text = text_of(30, 2)
    said = cluster.ask(cluster.request(text, sampling, placement)).text
    assert client.completions.create(prompt=text, echo=True, **fields).choices[0].text == text + said


def test_logprobs_are_grpcs_with_names_and_bytes(cluster: Cluster, client: openai.OpenAI, tokenizer: Any) -> None:
    expected = over_grpc(cluster, generate_pb2.SamplingParams(max_tokens=12, logprobs=3), LOCAL)
    fields: Any = {"model": MODEL, "messages": MESSAGES, "temperature": 0.0, "max_tokens": 12}
    whole = client.chat.completions.create(logprobs=True, top_logprobs=3, **fields)
    assert whole.choices[0].logprobs is not None
    entries = whole.choices[0].logprobs.content or []
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(logprobs=True, top_logprobs=3, stream=True, **fields):
        if chunk.choices and chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert [e.token for e in streamed] == [e.token for e in entries]
    assert len(entries) == len(expected.token_ids)
    for entry, ours, token_id in zip(entries, expected.logprobs, expected.token_ids, strict=True):
        assert entry.logprob == pytest.approx(ours.logprob, abs=1e-4)
        assert entry.token == tokenizer.decode([token_id])
        assert bytes(entry.bytes or []) == entry.token.encode()
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx([t.logprob for t in ours.top], abs=1e-4)
    old = client.completions.create(model=MODEL, prompt="One two three", max_tokens=5, temperature=0.0, logprobs=2)
    logprobs = old.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == old.choices[0].text
    assert (logprobs.text_offset or [])[:2] == [0, len((logprobs.tokens or [""])[0])]
    assert all(len(top) == 2 for top in logprobs.top_logprobs or [])


def test_bytes_of_characters_that_take_several_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Emoji: 😀😃😄😁😆😅😀😃😄😁😆😅", max_tokens=16, temperature=0.0
    )
    chat: Any = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Repeat: 😀😃😄😁😆😅"}],
        max_tokens=16,
        temperature=0.0,
        logprobs=True,
    )
    assert answer.choices[0].text
    data = b"".join(bytes(e.bytes) for e in chat.choices[0].logprobs.content)
    text = chat.choices[0].message.content
    assert data.decode(errors="replace").replace("<|im_end|>", "").startswith(text.rstrip("�"))


def test_a_stop_string_and_an_extension(cluster: Cluster, client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": "Count: one two three four five six seven", "temperature": 0.0}
    free = client.completions.create(max_tokens=12, **fields).choices[0].text
    stop = free[4:7]
    stopped = client.completions.create(max_tokens=12, stop=[stop], **fields).choices[0]
    assert (stopped.text, stopped.finish_reason) == (free[: free.index(stop)], "stop")
    long = client.completions.create(max_tokens=30, extra_body={"min_tokens": 30, "ignore_eos": True}, **fields)
    assert long.usage is not None
    assert long.usage.completion_tokens == 30


def test_cached_tokens_are_reported(client: openai.OpenAI, tokenizer: Any) -> None:
    prompt = tokens_of(tokenizer, 200, seed=901)
    fields: Any = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "extra_body": {"cache_salt": "http"}}
    details = [client.completions.create(**fields).usage.prompt_tokens_details for _ in range(2)]  # type: ignore[union-attr]
    assert [d.cached_tokens for d in details if d is not None] == [0, 192]


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": MESSAGES}
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(temperature=-1, **fields)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="gpt_mood"):
        client.chat.completions.create(extra_body={"gpt_mood": 1}, **fields)
    late: Any = {"extra_headers": {"x-deadline-ms": "5000"}, "extra_body": {"ignore_eos": True}, "max_tokens": 3000}
    stream = client.chat.completions.create(stream=True, **fields, **late)
    assert next(stream).choices[0].delta.role == "assistant", "tokens first, then the error"
    with pytest.raises(openai.APIError, match="no complete answer within 5 s") as cut:
        list(stream)
    assert cut.value.code == "deadline_exceeded"


def test_responses_say_what_chat_says(client: openai.OpenAI) -> None:
    fields: Any = {
        "model": MODEL,
        "input": "Why is the sky blue?",
        "instructions": "You are brief.",
        "temperature": 0.0,
    }
    expected = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0.0)
    whole = client.responses.create(max_output_tokens=12, **fields)
    assert whole.output_text == expected.choices[0].message.content
    assert whole.usage is not None
    assert expected.usage is not None
    assert whole.usage.input_tokens == expected.usage.prompt_tokens
    assert whole.usage.output_tokens == expected.usage.completion_tokens
    events = list(client.responses.create(max_output_tokens=12, stream=True, **fields))
    final: Any = events[-1].response  # type: ignore[union-attr]
    assert final.output_text == whole.output_text
    assert final.status == whole.status == "incomplete"
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events][:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    again = [
        {"role": "user", "content": "Why is the sky blue?"},
        *final.to_dict()["output"],
        {"role": "user", "content": [{"type": "input_text", "text": "And the sea?"}]},
    ]
    parsed: Any = client.responses.create(
        model=MODEL, input=again, max_output_tokens=4, include=["message.output_text.logprobs"], top_logprobs=2
    )
    assert len(parsed.output[0].content[0].logprobs) == 4
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        client.responses.create(model=MODEL, input="hi", previous_response_id="resp_1")


def test_models_and_request_ids(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=1, extra_headers={"X-Request-Id": "mine"}
    )
    assert (answer.id, answer._request_id) == ("chatcmpl-mine", "mine")


def test_leaving_a_stream_frees_everything(cluster: Cluster, client: openai.OpenAI) -> None:
    endless: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    for placement in ("split", "local"):
        headers = {"x-diptych-placement": placement}
        stream = client.chat.completions.create(stream=True, extra_headers=headers, **endless)
        for number, _ in enumerate(stream):
            if number == 3:
                break
        stream.close()
        cluster.assert_nothing_left(timeout_s=10.0)


async def test_async_clients_at_once(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=url(cluster), api_key="none", max_retries=0, timeout=60.0) as client:

        async def one(i: int) -> str:
            fields: Any = {
                "model": MODEL,
                "messages": [{"role": "user", "content": text_of(10 + 20 * i, i)}],
                "max_tokens": 10,
                "temperature": 0.0,
            }
            text = ""
            async for chunk in await client.chat.completions.create(stream=True, **fields):
                text += chunk.choices[0].delta.content or ""
            whole = await client.chat.completions.create(**fields)
            assert whole.choices[0].message.content == text
            return text

        assert all(await asyncio.gather(*(one(i) for i in range(8))))
        endless: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
        task = asyncio.create_task(client.chat.completions.create(**endless))
        deadline = time.monotonic() + 20
        while not cluster.cluster().router.live_requests:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    cluster.assert_nothing_left(timeout_s=10.0)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "moods": {"type": "array", "items": {"enum": ["glad", "sad"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "moods"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} of a city",
            "strict": True,  # the package's own helpers ask for it
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Bern", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "population")
]


async def test_structured_answers_are_valid_under_load_split_and_local(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=url(cluster), api_key="none", max_retries=0, timeout=120.0) as client:

        async def one(i: int) -> None:
            fields: Any = {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"{text_of(5 + 40 * (i % 4), i)} Invent a person."}],
                "max_tokens": 120,
                "seed": i,
                "extra_headers": {"x-diptych-placement": ("split", "local")[i % 2]},
            }
            kind = i % 3
            if kind == 0:
                fields["response_format"] = {
                    "type": "json_schema",
                    "json_schema": {"name": "person", "strict": True, "schema": SCHEMA},
                }
            elif kind == 1:
                fields["extra_body"] = {"structured_outputs": {"regex": "[0-9]{3}-[a-c]{2}"}}
            else:
                fields["extra_body"] = {"structured_outputs": {"choice": ["red", "green"]}}
            answer = await client.chat.completions.create(**fields)
            text = answer.choices[0].message.content or ""
            assert answer.choices[0].finish_reason == "stop", text
            if kind == 0:
                jsonschema.validate(json.loads(text), SCHEMA)
            elif kind == 1:
                assert re.fullmatch("[0-9]{3}-[a-c]{2}", text)
            else:
                assert text in ("red", "green")

        await asyncio.gather(*(one(i) for i in range(12)))


def test_a_format_that_cannot_be_used_is_named(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": MESSAGES}
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(extra_body={"structured_outputs": {"regex": "(("}}, **fields)
    assert bad.value.param == "structured_outputs"
    both: Any = {"response_format": {"type": "json_object"}, "extra_body": {"structured_outputs": {"choice": ["a"]}}}
    with pytest.raises(openai.BadRequestError, match="send one"):
        client.chat.completions.create(**both, **fields)
    with pytest.raises(openai.BadRequestError, match="'x' is not a token id"):
        client.chat.completions.create(logit_bias={"x": 1}, **fields)


def test_a_format_that_turns_out_not_to_fit_is_named_too(client: openai.OpenAI) -> None:
    """No token writes such a character, which only the worker knows."""
    schema = {"type": "object", "properties": {"a": {"const": "\U00040000"}}, "required": ["a"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=wanted, temperature=0)
    assert (refused.value.param, refused.value.code) == ("response_format", "invalid_json_schema")


def test_a_bias_moves_the_answer(client: openai.OpenAI, tokenizer: Any) -> None:
    (token,) = tokenizer.encode(" the")
    fields: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3, "temperature": 0.0}
    assert (
        client.chat.completions.create(logit_bias={str(token): 100}, **fields).choices[0].message.content == " the" * 3
    )


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "population"}}])
@pytest.mark.parametrize("placement", ["split", "local"])
def test_a_demanded_call_parses(client: openai.OpenAI, choice: Any, placement: str) -> None:
    fields: Any = {
        "model": MODEL, "messages": [{"role": "user", "content": "How is the weather in Bern?"}], "tools": TOOLS,
        "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 80, "temperature": 0.0,
        "extra_headers": {"x-diptych-placement": placement},
    }  # fmt: skip
    answer = client.chat.completions.create(**fields).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name in (("weather", "population") if choice == "required" else ("population",))
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
    with client.chat.completions.stream(**fields) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    again = [
        *fields["messages"],
        answer.message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after = client.chat.completions.create(**{**fields, "messages": again, "tool_choice": "auto", "max_tokens": 5})
    assert after.usage is not None
    assert after.usage.completion_tokens == 5 or after.choices[0].finish_reason == "stop"


def test_a_demanded_call_as_a_response(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    fields: Any = {
        "model": MODEL, "input": "How is the weather in Bern?", "tools": tools, "temperature": 0.0,
        "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 80,
    }  # fmt: skip
    whole = client.responses.create(**fields)
    (call,) = whole.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)["city"] in ("Bern", "Rome")) == ("weather", True)
    with client.responses.stream(**fields) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert streamed.arguments == call.arguments
    again: Any = [
        {"role": "user", "content": "How is the weather in Bern?"},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    assert client.responses.create(model=MODEL, input=again, tools=tools, max_output_tokens=4).usage is not None
