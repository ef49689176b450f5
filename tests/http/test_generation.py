"""Chat completions and completions as bytes on the wire, over a fake worker that answers any number of tokens."""

from __future__ import annotations

import json
import pkgutil
import socket
import threading
import time
from typing import Any

import pytest

from router.errors import Code, Failure
from tests.support.in_process_router import InProcessRouter
from tests.support.raw_http import Http

MODEL = "smollm2-135m-instruct"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hi", "max_tokens": 4, **fields}


def test_a_chat_completion(http: Http) -> None:
    answer = http.post(CHAT, chat(), **{"X-Request-Id": "r-1"})
    assert (answer.status, answer.headers["x-request-id"]) == (200, "r-1")
    body = answer.json
    assert (body["id"], body["object"], body["model"]) == ("chatcmpl-r-1", "chat.completion", MODEL)
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    usage = body["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["prompt_tokens"] > 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_chat_stream(http: Http) -> None:
    events = http.post(CHAT, chat(stream=True, stream_options={"include_usage": True})).events
    assert events.pop() == "[DONE]"
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert all(e["usage"] is None for e in events)
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert len({e["id"] for e in events}) == 1
    deltas = [e["choices"][0] for e in events]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert [d["finish_reason"] for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert deltas[-1]["delta"] == {}
    assert "usage" not in http.post(CHAT, chat(stream=True)).events[0]


def test_several_answers_share_a_prompt(http: Http) -> None:
    body = http.post(CHAT, chat(n=3, seed=1)).json
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    single = http.post(CHAT, chat()).json["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["prompt_tokens"] == single
    events = http.post(CHAT, chat(n=3, stream=True, stream_options={"include_usage": True})).events
    assert events.pop() == "[DONE]"
    assert events.pop()["usage"]["completion_tokens"] == 12
    for index in range(3):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_best_of_several_answers_are_given_and_all_are_counted(http: Http, path: str) -> None:
    asked = chat() if path == CHAT else {"model": MODEL, "prompt": "hi", "max_tokens": 4}
    single = http.post(path, asked).json
    body = http.post(path, {**asked, "n": 2, "best_of": 5}).json
    assert [c["index"] for c in body["choices"]] == [0, 1]
    assert all(c["logprobs"] is None for c in body["choices"])
    assert body["usage"]["completion_tokens"] == 5 * single["usage"]["completion_tokens"]
    assert body["usage"]["prompt_tokens"] == single["usage"]["prompt_tokens"]
    if path == COMPLETIONS:
        many = http.post(path, {**asked, "prompt": ["a"] * 65, "best_of": 2})
        assert many.status == 400
        assert "best_of = 2; at most 128 answers" in many.error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_answers_that_are_searched_for_come_whole(http: Http, path: str) -> None:
    asked = {**(chat() if path == CHAT else completion(prompt=["hi", "ho"])), "use_beam_search": True, "n": 2}
    asked |= {"best_of": 5, "length_penalty": 0.5, "early_stopping": "never", "return_token_ids": True}
    body = http.post(path, asked).json
    prompts = 1 if path == CHAT else 2
    assert [c["token_ids"] for c in body["choices"]] == [[40] * 4, [41] * 4] * prompts
    assert [c["index"] for c in body["choices"]] == list(range(2 * prompts))
    assert {c["finish_reason"] for c in body["choices"]} == {"length"}
    assert body["usage"]["completion_tokens"] == 8 * prompts
    long = {**asked, "stream": True, "max_tokens": 3000, "stream_options": {"include_usage": True}}
    events = http.post(path, long).events
    assert events.pop() == "[DONE]"
    assert events.pop()["usage"]["completion_tokens"] == 6000 * prompts
    for index in range(2 * prompts):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert [token for c in own for token in c.get("token_ids") or ()] == [40 + index % 2] * 3000
        assert own[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [1, 2, 3], [[1, 2, 3]]])
def test_a_completion_in_all_forms_of_prompt(http: Http, prompt: Any) -> None:
    body = http.post(COMPLETIONS, completion(prompt=prompt)).json
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 4


def test_a_completion_defaults_to_sixteen_tokens(http: Http) -> None:
    assert http.post(COMPLETIONS, {"model": MODEL, "prompt": "hi"}).json["usage"]["completion_tokens"] == 16


def test_log_probabilities_of_prompts(http: Http) -> None:
    prompts = [[5, 6, 7], [40, 41]]
    answer = http.post(COMPLETIONS, completion(prompt=prompts, n=2, max_tokens=1, prompt_logprobs=2)).json
    first, again, second, _ = [choice["prompt_logprobs"] for choice in answer["choices"]]
    assert first == again
    assert first[0] is None
    assert {k: (v["logprob"], v["rank"]) for k, v in first[1].items()} == {
        "6": (-0.125, 1), "1": (0.0, 1), "2": (-0.25, 2),
    }  # fmt: skip
    assert list(first[2]) == ["7", "2", "3"]
    assert [len(entry or ()) for entry in second] == [0, 3]
    assert all(isinstance(entry["decoded_token"], str) for entry in first[2].values())
    best = http.post(COMPLETIONS, completion(prompt=prompts, best_of=3, prompt_logprobs=2)).json
    assert [choice["prompt_logprobs"] for choice in best["choices"]] == [first, second]
    whole = http.post(CHAT, chat(prompt_logprobs=0, max_tokens=0)).json
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert whole["usage"]["completion_tokens"] == 0
    assert whole["choices"][0]["message"]["content"] == ""
    assert "prompt_logprobs" not in http.post(CHAT, chat()).json
    for fields, param in (({"prompt_logprobs": 16}, "prompt_logprobs"), ({"echo": True, "logprobs": 16}, "logprobs")):
        answer = http.post(COMPLETIONS, completion(prompt=[5] * 8000, **fields))
        assert (answer.status, answer.error["param"]) == (400, param)
        assert "136000 log-probabilities, the limit is 131072" in answer.error["message"]
        answer = http.post(COMPLETIONS, completion(prompt=[5] * 2000, n=40, max_tokens=1, **fields))
        assert (answer.status, answer.error["param"]) == (400, param)
        assert "more than 262144 log-probabilities" in answer.error["message"]


def test_answers_may_have_so_many_log_probabilities(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = chat(n=128, logprobs=True, top_logprobs=20, max_tokens=256)
    refused = http.post(CHAT, asked)
    assert (refused.status, refused.error["param"]) == (400, "max_tokens")
    assert "128 x 256 tokens with 21 log-probabilities each may come to 688128" in refused.error["message"]
    assert "lower max_tokens" in refused.error["message"]
    monkeypatch.setattr("router.doors.http.generate.MAX_SHOWN", 100)
    asked = chat(n=2, logprobs=True, top_logprobs=4, max_tokens=10)
    whole = http.post(CHAT, asked)
    assert [len(c["logprobs"]["content"]) for c in whole.json["choices"]] == [10, 10]
    assert http.post(CHAT, {**asked, "max_tokens": 11}).status == 400
    assert http.post(CHAT, {**asked, "max_tokens": 11, "stream": True}).status == 200, "it is said as it comes"
    assert http.post(CHAT, {**asked, "max_tokens": None}).json["usage"]["completion_tokens"] == 20, (
        "no reason to refuse"
    )
    assert http.post(COMPLETIONS, completion(best_of=26)).status == 400, "they are kept until the best is known"
    assert http.post(COMPLETIONS, completion(best_of=25)).status == 200
    assert http.post(COMPLETIONS, completion(prompt=["a", "b"], n=5, logprobs=2)).status == 400
    asked = {"model": MODEL, "input": "hi", "top_logprobs": 4, "stream": True}
    refused = http.post("/v1/responses", {**asked, "max_output_tokens": 6})
    assert (refused.status, refused.error["param"]) == (400, "max_output_tokens"), "its end says all of them again"
    assert http.post("/v1/responses", {**asked, "max_output_tokens": 5}).status == 200
    whole = http.post("/v1/responses", {**asked, "max_output_tokens": 6, "stream": False}).json
    assert len(whole["output"][0]["content"][0]["logprobs"]) == 6


@pytest.mark.parametrize(
    ("tokens", "thread"), [(12, "router"), (13, "tokenize_")], ids=["few stay on the loop", "many leave it"]
)
def test_log_probabilities_are_written_beside_the_loop(
    tokens: int, thread: str, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for path in ("router.doors.http.shapes.chat_logprobs", "router.doors.http.generate.json_of"):
        called = pkgutil.resolve_name(path)

        def noted(*args: Any, called: Any = called) -> Any:
            seen.append(threading.current_thread().name)
            return called(*args)

        monkeypatch.setattr(path, noted)
    body = http.post(CHAT, chat(logprobs=True, top_logprobs=20, max_tokens=tokens)).json
    assert len(body["choices"][0]["logprobs"]["content"]) == tokens
    assert [name.startswith(thread) for name in seen] == [True, True], seen


def test_an_echo_with_log_probabilities(http: Http) -> None:
    fields = completion(prompt="one two three", echo=True, logprobs=1, max_tokens=2, n=2)
    body = http.post(COMPLETIONS, fields).json
    tokens = body["usage"]["prompt_tokens"]
    for choice in body["choices"]:
        said, text = choice["logprobs"], choice["text"]
        assert text.startswith("one two three")
        assert {len(column) for column in said.values()} == {tokens + 2}
        assert "".join(said["tokens"][:tokens]) == "one two three"
        assert said["token_logprobs"] == [None, *(-i / 8 for i in range(1, tokens)), -1.0, -1.0]
        assert said["text_offset"][: tokens + 1] == [0, 3, 7, len("one two three")]
        assert said["top_logprobs"][0] is None
        assert all(len(best) == 2 for best in said["top_logprobs"][1:tokens])
    scored = http.post(COMPLETIONS, completion(prompt="one two three", echo=True, max_tokens=0)).json
    assert (scored["choices"][0]["text"], scored["choices"][0]["logprobs"]) == ("one two three", None)
    assert scored["usage"]["completion_tokens"] == 0
    events = http.post(COMPLETIONS, completion(prompt="one", echo=True, max_tokens=0, stream=True)).events
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["one", ""]


def test_a_batch_of_prompts_echoed(http: Http) -> None:
    fields = completion(prompt=["one two", "three"], n=2, echo=True)
    body = http.post(COMPLETIONS, fields).json
    starts = ["one two", "one two", "three", "three"]
    assert [c["text"].startswith(s) for c, s in zip(body["choices"], starts, strict=True)] == [True] * 4
    assert body["usage"]["completion_tokens"] == 16
    events = http.post(COMPLETIONS, {**fields, "stream": True}).events[:-1]
    for index, start in enumerate(starts):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in own).startswith(start)
        assert own[-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        (CHAT, {"frequency_penalti": 1}, "frequency_penalti", "did you mean frequency_penalty?"),
        (CHAT, {"store": True}, "store", "nothing is stored"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions", "use `tools`"),
        (CHAT, {"guided_json": {}}, "guided_json", "structured_outputs"),
        (CHAT, {"use_beam_search": True, "n": 17}, "n", "so many beams are searched; use 1 to 16"),
        (CHAT, {"use_beam_search": True, "best_of": 17}, "best_of", "so many beams are searched; use 1 to 16"),
        (CHAT, {"use_beam_search": True, "n": 3, "best_of": 2}, "best_of", "use 3 to 16"),
        (CHAT, {"use_beam_search": True, "temperature": 0.7}, "temperature", "the model's distribution alone"),
        (CHAT, {"use_beam_search": True, "logprobs": True}, "logprobs", "the model's distribution alone"),
        (CHAT, {"use_beam_search": True, "stop": "x"}, "stop", "the model's distribution alone"),
        (CHAT, {"use_beam_search": True, "logit_bias": {"5": 1}}, "logit_bias", "the model's distribution alone"),
        (
            CHAT,
            {"use_beam_search": True, "response_format": {"type": "json_object"}},
            "response_format",
            "the model's distribution alone",
        ),
        (CHAT, {"use_beam_search": True, "length_penalty": 9}, "length_penalty", "[-5, 5]"),
        (CHAT, {"use_beam_search": True, "early_stopping": "soon"}, "early_stopping", '"never"'),
        (CHAT, {"length_penalty": 2}, "length_penalty", "send use_beam_search: true"),
        (CHAT, {"early_stopping": True}, "early_stopping", "send use_beam_search: true"),
        (CHAT, {"messages": []}, "messages", "send at least one"),
        (CHAT, {"messages": None}, "messages", "valid list"),
        (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "'robot' does not exist"),
        (CHAT, {"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "valid"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is missing"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            "messages[0].content[0].type",
            "'image_url' is not supported; send text",
        ),
        (CHAT, {"messages": [{"role": "user", "contnet": "a"}]}, "messages[0].content", "is missing"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "images": ["b"]}]}, "messages[0].images", "text only"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "a", "prefix": True}]},
            "messages[0].prefix",
            "continue_final_message",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "a"}}]}]},
            "messages[0].tool_calls[0].function",
            "'custom' is not supported",
        ),
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "knows no effort"),
        (CHAT, {"reasoning_effort": "huge"}, "reasoning_effort", "does not exist"),
        (CHAT, {"temperature": "hot"}, "temperature", "valid number"),
        (CHAT, {"temperature": -1}, "temperature", "temperature is -1"),
        (CHAT, {"top_p": 0}, "top_p", "(0, 1]"),
        (CHAT, {"n": 0}, "n", "use 1..128"),
        (CHAT, {"n": 129}, "n", "use 1..128"),
        (CHAT, {"n": True}, "n", "valid integer"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "at least one token"),
        (CHAT, {"max_tokens": 9000}, "max_tokens", "ask for at most"),
        (CHAT, {"max_completion_tokens": 5}, "max_tokens", "differ"),
        (CHAT, {"max_tokens": 1 << 40}, "max_tokens", "less than"),
        (CHAT, {"stop": ["x"] * 17}, "stop", "limit is 16"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0..20"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "for streams"),
        (CHAT, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "leave it out"),
        (CHAT, {"service_tier": "gold"}, "service_tier", "use auto, default"),
        (CHAT, {"priority": 101}, "priority", "-100..100"),
        (CHAT, {"seed": 1 << 70}, "seed", "seed"),
        (CHAT, {"top_k": -2}, "top_k", "where 0 is off"),
        (CHAT, {"stop_token_ids": [1 << 30]}, "stop_token_ids", "vocabulary"),
        (CHAT, {"request_id": "é"}, None, "request_id is not"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 10_000}]}, "messages", "context limit is 8192"),
        (CHAT, {"model": "gpt-9"}, "model", "served is"),
        (COMPLETIONS, {"prompt": []}, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": [True]}, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "empty"),
        (COMPLETIONS, {"prompt": [49152]}, "prompt", "vocabulary of 49152"),
        (COMPLETIONS, {"prompt": ["a"] * 65, "n": 2}, "prompt", "at most 128 answers"),
        (COMPLETIONS, {"prompt": [1] * 9000}, "prompt", "9000 tokens and the context limit is 8192"),
        (COMPLETIONS, {"prompt": [[1] * 9000]}, "prompt", "9000 tokens and the context limit is 8192"),
        (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt", "129 prompts"),
        (CHAT, {"messages": [{}] * 5000}, "messages", "5000 elements, the limit is 4096"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [1] * 100_000}]},
            "messages[0].content[0]",
            "valid dictionary",
        ),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * 300_000}]}, None, "opening brackets"),
        (COMPLETIONS, {"suffix": "b"}, "suffix", "no infilling"),
        (COMPLETIONS, {"best_of": 3, "stream": True}, "best_of", "stream: false"),
        (COMPLETIONS, {"best_of": 2, "n": 3}, "best_of", "use n (3) to 128"),
        (COMPLETIONS, {"best_of": 129}, "best_of", "use n (1) to 128"),
        (CHAT, {"best_of": 2, "stream": True}, "best_of", "stream: false"),
        (COMPLETIONS, {"echo": True, "logprobs": 1, "stream": True}, "echo", "send stream: false"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "send stream: false"),
        (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs", "use 0..20"),
        (CHAT, {"prompt_logprobs": -1}, "prompt_logprobs", "use 0..20"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "at least one"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs", "0..20"),
    ],
)
def test_what_cannot_be_carried_out_is_named(
    http: Http, path: str, fields: dict[str, Any], param: str | None, words: str
) -> None:
    for stream in (False, True):
        body = (chat if path == CHAT else completion)(**{"stream": stream, **fields})
        if "stream_options" in fields and "stream" not in fields:
            body["stream"] = False
        answer = http.post(path, body)
        assert answer.status == (404 if fields.get("model") else 400), answer
        assert answer.error["type"] == "invalid_request_error"
        assert answer.error["param"] == param, answer.error
        assert words in answer.error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": ""}, "input", "no input"),
        ({"input": []}, "input", "no input"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type", "'item_reference' is not supported"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is missing"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role", "'robot' does not exist"),
        ({"input": [{"type": "reasoning", "id": "a", "summary": []}]}, "input", "beside reasoning"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "knows no effort"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "leave it out"),
        ({"tools": [{"type": "fuction"}]}, "tools[0].type", "'fuction' does not exist"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "send text"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input[0].arguments", "is missing"),
        ({"store": True}, "store", "nothing is stored"),
        ({"background": True}, "background", "as long as its connection"),
        ({"conversation": "c"}, "conversation", "send the conversation as input"),
        ({"include": ["reasoning.text"]}, "include", "message.output_text.logprobs"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "does not exist"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "is missing"),
        ({"max_output_tokens": 9000}, "max_output_tokens", "ask for at most"),
        ({"inputs": "a"}, "inputs", "did you mean input?"),
    ],
)
def test_what_responses_cannot_do_is_named(http: Http, fields: dict[str, Any], param: str, words: str) -> None:
    answer = http.post("/v1/responses", {"model": MODEL, "input": "hi", **fields})
    assert answer.status == 400, answer
    assert answer.error["param"] == param
    assert words in answer.error["message"]


def test_a_response_that_fails_in_the_middle_says_so(http: Http, running: InProcessRouter) -> None:
    with http.socket() as connection:
        body = {"model": MODEL, "input": "hi", "stream": True, "max_output_tokens": 8000, "ignore_eos": True}
        send(connection, body, path="/v1/responses")
        said = wait_for(connection, b"response.output_text.delta")

        async def fail() -> None:
            running.router.dispatcher.fail_all(Failure(Code.UNAVAILABLE, "the worker is gone", 1000))

        running.on_loop(fail(), 5.0)
        said += wait_for(connection, b"0\r\n\r\n")
        last = said.split(b"event: ")[-1]
        assert last.startswith(b"response.failed\n")
        assert b'"error":{"code":"unavailable","message":"the worker is gone"}' in last


def test_fields_that_ask_for_nothing_are_taken(http: Http) -> None:
    nothing = {
        "store": False, "functions": None, "modalities": ["text"], "user": "u", "metadata": {"a": "b"}, "echo": False,
        "prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low", "reasoning_effort": None,
        "skip_special_tokens": True, "service_tier": "auto", "stop": None, "logit_bias": None, "tools": None,
    }  # fmt: skip
    answer = http.post(CHAT, chat(**nothing))
    assert answer.status == 200, answer
    assert answer.json["service_tier"] == "auto"


def test_headers_say_placement_and_deadline(http: Http) -> None:
    split = http.post(CHAT, chat(), **{"X-Diptych-Placement": "split"})
    assert (split.status, split.error["code"]) == (400, "failed_precondition")
    assert http.post(CHAT, chat(), **{"X-Diptych-Placement": "sideways"}).status == 400
    assert http.post(CHAT, chat(), **{"X-Deadline-Ms": "soon"}).status == 400
    late = http.post(CHAT, chat(max_tokens=8000, ignore_eos=True), **{"X-Deadline-Ms": "300"})
    assert (late.status, late.error["code"]) == (504, "deadline_exceeded")
    assert late.headers["x-should-retry"] == "false"
    begun = http.post(CHAT, chat(max_tokens=8000, ignore_eos=True, stream=True), **{"X-Deadline-Ms": "300"})
    assert begun.status == 200
    assert begun.events[-1]["error"]["code"] == "deadline_exceeded", "no [DONE] after an error"
    assert begun.events[-2]["choices"]


def test_two_live_requests_with_one_id_are_both_answered(http: Http) -> None:
    with http.socket() as first:
        send(first, chat(max_tokens=2000, stream=True), "mine")
        wait_for(first, b"chatcmpl-mine")
        second = http.post(CHAT, chat(), **{"X-Request-Id": "mine"})
        assert second.status == 200
        assert second.headers["x-request-id"] == "mine"


def send(connection: socket.socket, body: dict[str, Any], request_id: str = "r", path: str = CHAT) -> None:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\nx-request-id: {request_id}\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)


def wait_for(connection: socket.socket, words: bytes) -> bytes:
    said = b""
    while words not in said:
        part = connection.recv(65536)
        assert part, said
        said += part
    return said


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_ends_its_requests(http: Http, running: InProcessRouter, stream: bool, n: int) -> None:
    with http.socket() as connection:
        send(connection, chat(max_tokens=8000, ignore_eos=True, stream=stream, n=n))
        if stream:
            wait_for(connection, b'"content"')
        else:
            live(running, n)
    running.becomes_empty()


def live(running: InProcessRouter, count: int) -> None:
    deadline = time.monotonic() + 10
    while running.router.dispatcher.live_requests < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_an_error_in_the_middle_of_a_stream_ends_it_without_done(http: Http, running: InProcessRouter) -> None:
    with http.socket() as connection:
        send(connection, chat(max_tokens=8000, ignore_eos=True, stream=True))
        said = wait_for(connection, b'"content"')

        async def fail() -> None:
            running.router.dispatcher.fail_all(Failure(Code.UNAVAILABLE, "the worker is gone", 1000))

        running.on_loop(fail(), 5.0)
        said += wait_for(connection, b"0\r\n\r\n")
        assert said.endswith(
            b'data: {"error":{"message":"the worker is gone","type":"server_error","param":null,'
            b'"code":"unavailable"}}\n\n\r\n0\r\n\r\n'
        )
        assert b"[DONE]" not in said
        send(connection, chat())  # the connection itself is well
        wait_for(connection, b'"total_tokens"')


def test_a_client_that_does_not_read_is_cut_off(http: Http, running: InProcessRouter) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", http.port))
    with connection:
        send(connection, chat(max_tokens=8000, ignore_eos=True, stream=True, n=128))
        wait_for(connection, b'"content"')
        running.becomes_empty(30.0)
    assert http.post(CHAT, chat()).status == 200


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


BAD_SCHEMA = {"type": "object", "properties": {"days": {"type": "array", "contains": {"type": "string"}}}}
BAD_TOOL = {"type": "function", "function": {"name": "forecast", "parameters": BAD_SCHEMA}}
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
ENDLESS_TOOL = {"type": "function", "function": {"name": "again", "parameters": ENDLESS}}


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        *(
            (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}, **more}, *told)
            for schema in (BAD_SCHEMA, ENDLESS, {"$ref": "#"}, {"anyOf": []}, {"enum": [1 << 60]})
            for more in ({}, {"tools": [TOOL]}, {"stream": True})
            for told in [("response_format", "invalid_json_schema")]
        ),
        *(
            ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema", "name": "a", "schema": s}}}, *t)
            for s in (BAD_SCHEMA, ENDLESS, {"$ref": "#"})
            for t in [("text.format", "invalid_json_schema")]
        ),
        *(
            (CHAT, {"tools": [TOOL, tool], "tool_choice": "required"}, *told)
            for tool in (BAD_TOOL, ENDLESS_TOOL)
            for told in [("tools[1].function.parameters", "invalid_function_parameters")]
        ),
        (CHAT, {"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs", "invalid_json_schema"),
        (CHAT, {"structured_outputs": {"regex": "(("}}, "structured_outputs", "invalid_value"),
    ],
)
def test_a_schema_that_no_answer_can_follow_is_named(
    http: Http, path: str, fields: dict[str, Any], param: str, code: str
) -> None:
    answer = http.post(path, {**(chat() if path == CHAT else {}), **fields})
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, code), answer.error
    assert "`structured`" not in answer.error["message"]


def test_a_schema_may_refer_to_itself_if_it_can_end(http: Http) -> None:
    either = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
    node = {"type": "object", "properties": {"next": either}, "required": ["next"]}
    for schema in (node, {"type": "object", "properties": {"next": {"$ref": "#"}}}):
        asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        assert http.post(CHAT, chat(response_format=asked)).status == 200, schema


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [TOOL]}, None, ""),
        ({"tools": [TOOL], "tool_choice": "none"}, None, ""),
        ({"tools": [TOOL], "tool_choice": "required"}, None, ""),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}, "n": 2}, None, ""),
        ({"tools": [TOOL], "parallel_tool_calls": False, "stream": True}, None, ""),
        ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, None, ""),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, None, ""),
        ({"tools": [BAD_TOOL]}, None, ""),
        ({"tools": [BAD_TOOL], "response_format": {"type": "json_object"}}, None, ""),
        (
            {"tools": [TOOL, BAD_TOOL], "tool_choice": "required"},
            "tools[1].function.parameters",
            "tool 'forecast' cannot be enforced: properties.days.contains: Unimplemented keys",
        ),
        (
            {"tools": [TOOL], "response_format": {"type": "json_schema", "json_schema": {"schema": BAD_SCHEMA}}},
            "response_format",
            "the format of `response_format` cannot be enforced: properties.days.contains",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": BAD_SCHEMA}}},
            "response_format",
            "the format of `response_format` cannot be used: properties.days.contains",
        ),
        ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs", "send response_format"),
        ({"tools": [TOOL], "tool_choice": "none", "structured_outputs": {"regex": "a"}}, None, ""),
        ({"tools": [], "tool_choice": "auto"}, None, ""),
        ({"response_format": {"type": "json_object"}}, None, ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}, None, ""),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, None, ""),
        ({"structured_outputs": {"json": {"type": "integer"}}}, None, ""),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None, ""),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "a function by name"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "send only the tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "there is no tool 'x'",
        ),
        ({"tools": [TOOL, TOOL]}, "tools", "two tools are called weather"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools", "a tool is not of the form"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "text"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format", ""),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "2 formats"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag", "not supported"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "may set"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "[-100, 100]"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "is empty"),
        ({"allowed_token_ids": [99999]}, "allowed_token_ids", "vocabulary"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids", "vocabulary"),
        ({"allowed_token_ids": list(range(5000))}, "allowed_token_ids", "limit is 4096"),
        ({"bad_words": ["x"] * 300}, "bad_words", "limit is 256"),
        ({"bad_words": [""]}, "bad_words", "no text"),
        ({"bad_words": ["no spaces " * 50]}, "bad_words", "limit is 64"),
        ({"bad_words": ["x"], "structured_outputs": {"regex": "a"}}, "bad_words", "leave one of them out"),
        ({"bad_words": ["x"], "tools": [TOOL], "tool_choice": "required"}, "bad_words", "leave one of them out"),
    ],
)
def test_tools_and_formats_are_checked_before_any_work(
    http: Http, fields: dict[str, Any], param: str | None, words: str
) -> None:
    answer = http.post(CHAT, chat(**fields))
    if param is None:
        assert answer.status == 200, answer
    else:
        assert (answer.status, answer.error["param"]) == (400, param), answer.error
        assert words in answer.error["message"]


def test_a_conversation_with_calls_is_rendered(http: Http) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    answer = http.post(CHAT, chat(messages=messages, tools=[TOOL]))
    assert answer.status == 200, answer
    missing = http.post(CHAT, chat(messages=[*messages[:2], {"role": "tool", "content": "sunny"}], tools=[TOOL]))
    assert missing.error["param"] == "messages[2].tool_call_id"
    items = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    tools = [{"type": "function", **TOOL["function"]}]  # type: ignore[dict-item]
    body = {"model": MODEL, "input": items, "tools": tools, "max_output_tokens": 3}
    assert http.post("/v1/responses", body).json["usage"]["input_tokens"] == answer.json["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses"])
@pytest.mark.parametrize(("asked", "shown"), [(None, MODEL), ("", MODEL), (MODEL, MODEL), ("small", "small")])
def test_a_model_has_several_names_and_needs_none(http: Http, path: str, asked: str | None, shown: str) -> None:
    what = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, COMPLETIONS: {"prompt": "hi"}}
    body = {"model": asked, **({"max_tokens": 1, **what[path]} if path in what else {"input": "hi"})}
    for sent in (body, {k: v for k, v in body.items() if v}):
        answer = http.post(path, {**sent, "max_output_tokens": 1} if "input" in sent else sent)
        assert (answer.status, answer.json["model"]) == (200, shown), answer.body


def test_a_command_line_that_asks_for_nothing_special_is_answered(http: Http) -> None:
    """As the Codex command line asks."""
    function = {"type": "function", "name": "shell", "description": "Runs.", "strict": False, "parameters": {}}
    others = [{"type": "web_search"}, {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}}]
    body = {
        "model": MODEL,
        "instructions": "You are brief.",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "tools": [function, *others],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "none", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "a",
        "client_metadata": {"x": "y"},
        "truncation": "auto",
        "text": {"verbosity": "low"},
        "chat_template_kwargs": {"enable_thinking": False},
        "max_output_tokens": 3,
    }
    answer = http.post("/v1/responses", body)
    assert answer.status == 200, answer.body
    assert answer.events[-1]["response"]["tools"] == [function]
    body["stream"] = False
    assert http.post("/v1/responses", body).json["output"][0]["content"][0]["logprobs"] == []


def test_what_asks_for_nothing_is_nothing(http: Http) -> None:
    for more in ({"stop": ""}, {"stop": ["", ""]}, {"request_id": ""}, {"stop": []}):
        assert http.post(CHAT, chat(max_tokens=2, ignore_eos=True, **more)).status == 200, more


LONG = "word " * 10_000


@pytest.mark.parametrize(
    ("path", "fields", "status", "code"),
    [
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, 400, "context_length_exceeded"),
        (CHAT, {"max_tokens": 9000}, 400, "context_length_exceeded"),
        (COMPLETIONS, {"prompt": LONG}, 400, "context_length_exceeded"),
        (COMPLETIONS, {"prompt": [1] * 9000}, 400, "context_length_exceeded"),
        ("/v1/responses", {"input": LONG, "truncation": "auto"}, 400, "context_length_exceeded"),
        ("/detokenize", {"tokens": [1] * 9000}, 400, "context_length_exceeded"),
        (CHAT, {"model": "gpt-9"}, 404, "model_not_found"),
        ("/tokenize", {"model": "gpt-9", "prompt": "a"}, 404, "model_not_found"),
        (CHAT, {"frequency_penalti": 1}, 400, "unknown_parameter"),
        (CHAT, {"store": True}, 400, "unsupported_parameter"),
        (CHAT, {"messages": None}, 400, "invalid_type"),
        (CHAT, {"temperature": -1}, 400, "invalid_value"),
        (CHAT, {"tool_choice": "required"}, 400, "invalid_value"),
        (CHAT, {"tools": [BAD_TOOL], "tool_choice": "required"}, 400, "invalid_function_parameters"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": BAD_SCHEMA}}},
            400,
            "invalid_json_schema",
        ),
        (
            CHAT,
            {"tools": [TOOL], "response_format": {"type": "json_schema", "json_schema": {"schema": BAD_SCHEMA}}},
            400,
            "invalid_json_schema",
        ),
        ("/v1/responses", {"input": "a", "x-unknown": 1}, 400, "unknown_parameter"),
    ],
)
def test_programs_can_tell_errors_apart(http: Http, path: str, fields: dict[str, Any], status: int, code: str) -> None:
    base = {CHAT: chat(), COMPLETIONS: completion()}.get(path, {})
    answer = http.post(path, {**base, **fields})
    assert (answer.status, answer.error["code"]) == (status, code), answer.error


def test_a_body_that_is_no_json_has_a_word_too(http: Http) -> None:
    assert http.post(CHAT, b"{").error["code"] == http.post(CHAT, [1]).error["code"] == "invalid_json"
    assert http.post("/tokenize", b'{"prompt": "' + b"x" * (3 << 20)).error["code"] == "request_too_large"


@pytest.mark.parametrize("arguments", [r'{"a": "\ud800"}', r'{"\udc00": 1}', r'{"a": "\ud83d\ude00"}'])
@pytest.mark.parametrize("tools", [False, True])
def test_half_a_character_in_a_call_s_arguments_is_text(http: Http, arguments: str, tools: bool) -> None:
    """A model may write one, and clients send it back."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    function = {"name": "f", "parameters": {"type": "object"}, "description": "half: \\ud800"}
    offered = {"tools": [{"type": "function", "function": function}]} if tools else {}
    assert http.post(CHAT, chat(messages=messages, **offered)).status == 200


@pytest.mark.parametrize("tools", [{}, {"tools": [TOOL]}], ids=["", "tools"])
def test_a_chat_goes_on_with_its_last_message(http: Http, tools: dict[str, Any]) -> None:
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, I"}]
    asked = chat(messages=begun, return_token_ids=True, **tools)
    for fields, end in (
        ({"continue_final_message": True}, "<|im_start|>assistant\nWell, I"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<|im_start|>assistant\nWell, I"),
        ({"add_generation_prompt": False}, "Well, I<|im_end|>\n"),
        ({}, "Well, I<|im_end|>\n<|im_start|>assistant\n"),
    ):
        answer = http.post(CHAT, asked | fields).json
        prompt = http.post("/detokenize", {"tokens": answer["prompt_token_ids"]}).json["prompt"]
        assert prompt.endswith(end)
        assert answer["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"])
    both = http.post(CHAT, asked | {"continue_final_message": True, "add_generation_prompt": True})
    assert (both.status, both.error["param"]) == (400, "continue_final_message")


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}, {"n": 2}, {"prompt": ["hi", "so"]}])
def test_ids_of_tokens(http: Http, fields: dict[str, Any]) -> None:
    """Of a prompt once, whatever the number of its answers."""
    asked = completion(return_token_ids=True, **fields)
    prompts = [http.post("/tokenize", {"prompt": text}).json["tokens"] for text in ("hi", "so")]
    expected = dict(enumerate(prompts)) if "prompt" in fields else {0: prompts[0]}
    whole = http.post(COMPLETIONS, asked).json["choices"]
    assert {c["index"]: c["prompt_token_ids"] for c in whole if "prompt_token_ids" in c} == expected
    assert [len(c["token_ids"]) for c in whole] == [4] * len(whole)
    said: dict[int, list[int]] = {}
    streamed: dict[int, list[int]] = {}
    for event in http.post(COMPLETIONS, {**asked, "stream": True}).events[:-1]:
        (choice,) = event["choices"]
        said.setdefault(choice["index"], []).extend(choice["token_ids"])
        if "prompt_token_ids" in choice:
            assert choice["index"] not in streamed
            streamed[choice["index"]] = choice["prompt_token_ids"]
    assert streamed == expected
    assert {i: len(ids) for i, ids in said.items()} == dict.fromkeys(range(len(whole)), 4)


def test_many_prompts_with_many_bad_words(http: Http) -> None:
    prompts = [f"number {i}" for i in range(20)]
    words = [f"word{i:03}" for i in range(256)]
    answer = http.post(COMPLETIONS, completion(prompt=prompts, n=2, bad_words=words, allowed_token_ids=[5, 90])).json
    assert [c["index"] for c in answer["choices"]] == list(range(40))


def test_the_end_of_a_prompt(http: Http) -> None:
    ids = list(range(10, 60))
    for kept, expected in ((3, ids[-3:]), (50, ids), (1000, ids), (-1, ids)):
        answer = http.post(COMPLETIONS, completion(prompt=ids, truncate_prompt_tokens=kept, return_token_ids=True)).json
        assert answer["choices"][0]["prompt_token_ids"] == expected
    long = [7] * 9000 + ids
    answer = http.post(COMPLETIONS, completion(prompt=[long, ids], truncate_prompt_tokens=-1)).json
    assert answer["usage"]["prompt_tokens"] == 8192 - 4 + 50
    text = "word " * 60_000
    assert http.post(COMPLETIONS, completion(prompt=text)).status == 400
    answer = http.post(COMPLETIONS, completion(prompt=text, truncate_prompt_tokens=9)).json
    assert answer["usage"]["prompt_tokens"] == 9
    assert http.post(CHAT, chat(truncate_prompt_tokens=2)).json["usage"]["prompt_tokens"] == 2
    for wrong in (0, -2):
        refused = http.post(COMPLETIONS, completion(truncate_prompt_tokens=wrong))
        assert (refused.status, refused.error["param"]) == (400, "truncate_prompt_tokens")


@pytest.mark.parametrize("variable", ["add_generation_prompt", "continue_final_message"])
def test_template_variables_do_not_ask_for_what_fields_may_not(http: Http, variable: str) -> None:
    answer = http.post(CHAT, chat(chat_template_kwargs={variable: False}))
    assert (answer.status, answer.json["error"]["param"]) == (400, "chat_template_kwargs")


def test_an_error_of_ours_is_told_as_one(http: Http, running: InProcessRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(running.router.dispatcher, "_submit", fails)
    answer = http.post(CHAT, chat())
    assert (answer.status, answer.json["error"]["message"]) == (
        500, "the router failed on this request (TypeError); see its log",
    )  # fmt: skip
