"""Features in pairs: each pair is answered, or refused by the name of one of the two."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.raw_http import Http

MODEL = "smollm2-135m-instruct"
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses"}
SCHEMA = {"type": "object", "properties": {"color": {"type": "string"}}, "required": ["color"]}
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
BY_NAME = {"type": "function", "function": {"name": "weather"}}
ANYWHERE: dict[str, Any] = {
    "temperature": {"temperature": 0},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "seed": {"seed": 7},
    "stop": {"stop": ["x", "}"]},
    "stop_token_ids": {"stop_token_ids": [5]},
    "ignore_eos": {"ignore_eos": True},
    "min_tokens": {"min_tokens": 2},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": {"7": 1}},
    "allowed_token_ids": {"allowed_token_ids": [7, 8, 9]},
    "bad_words": {"bad_words": ["ugh", "blue moon"]},
    "include_stop_str_in_output": {"include_stop_str_in_output": True},
    "skip_special_tokens": {"skip_special_tokens": False},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 1},
    "stream": {"stream": True},
    "service_tier": {"service_tier": "flex"},
    "priority": {"priority": 1},
    "cache_salt": {"cache_salt": "a"},
    "prompt_cache_key": {"prompt_cache_key": "a"},
    "session_id": {"session_id": "a"},
    "structured_outputs json": {"structured_outputs": {"json": SCHEMA}},
    "structured_outputs regex": {"structured_outputs": {"regex": "a+"}},
    "structured_outputs choice": {"structured_outputs": {"choice": ["a", "b"]}},
    "structured_outputs grammar": {"structured_outputs": {"grammar": 'start: "a"'}},
    "structured_outputs json_object": {"structured_outputs": {"json_object": True}},
    "guided_json": {"guided_json": SCHEMA},
    "max_tokens": {},
}
RESPONSE_FORMATS: dict[str, Any] = {
    "response_format text": {"response_format": {"type": "text"}},
    "response_format json_object": {"response_format": {"type": "json_object"}},
    "response_format json_schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    },
}
SEVERAL: dict[str, Any] = {
    "n": {"n": 2},
    "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
    "return_token_ids": {"return_token_ids": True},
}
TOOLS: dict[str, Any] = {
    "tools": {},
    "tools none": {"tool_choice": "none"},
    "tools required": {"tool_choice": "required"},
    "tools by name": {"tool_choice": BY_NAME},
    "tools one call": {"parallel_tool_calls": False},
}
TEMPLATE: dict[str, Any] = {"chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": False}}}
FEATURES: dict[str, dict[str, Any]] = {
    "chat": {
        **ANYWHERE,
        **RESPONSE_FORMATS,
        **SEVERAL,
        **TEMPLATE,
        **{name: {"tools": [{"type": "function", "function": FUNCTION}], **more} for name, more in TOOLS.items()},
        "logprobs": {"logprobs": True, "top_logprobs": 2},
        "prompt_logprobs": {"prompt_logprobs": 1},
        "reasoning_effort": {"reasoning_effort": "none"},
        "add_generation_prompt": {"add_generation_prompt": False},
        "continue_final_message": {"continue_final_message": True},
    },
    "completions": {
        **ANYWHERE,
        **RESPONSE_FORMATS,
        **SEVERAL,
        "logprobs": {"logprobs": 2},
        "prompt_logprobs": {"prompt_logprobs": 1},
        "echo": {"echo": True},
        "suffix": {"suffix": "b"},
        "best_of": {"best_of": 1},
        "several prompts": {"prompt": ["a", "b"]},
        "tokens": {"prompt": [1, 2, 3]},
    },
    "responses": {
        **ANYWHERE,
        **TEMPLATE,
        **{name: {"tools": [{"type": "function", **FUNCTION}], **more} for name, more in TOOLS.items()},
        "text.format text": {"text": {"format": {"type": "text"}}},
        "text.format json_object": {"text": {"format": {"type": "json_object"}}},
        "text.format json_schema": {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}},
        "logprobs": {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        "reasoning": {"reasoning": {"effort": "none", "summary": "auto"}},
        "truncation": {"truncation": "auto"},
        "instructions": {"instructions": "Be brief."},
    },
}
MASKS = ("allowed_token_ids", "bad_words")
FORMATS = ("structured_outputs", "response_format", "text.format", "tools")  # of the answer
NO_FORMATS = ("tools none", "tools one call", "response_format text", "text.format text")
ALONE = {"suffix": "suffix", "guided_json": "guided_json"}  # refused whatever stands beside it


def refused(one: str, other: str) -> str | None:
    """The field that a pair is refused for."""
    for first, second in ((one, other), (other, one)):
        if first in ALONE:
            return ALONE[first]
        if first in MASKS and second.startswith(FORMATS) and second not in ("tools", *NO_FORMATS):
            return first
        if first.startswith("structured_outputs"):
            if second.startswith("tools") and second != "tools none":
                return "structured_outputs"
            if second.startswith(("response_format", "text.format")) and not second.endswith(" text"):
                return "structured_outputs"
        if (first, second) == ("echo", "truncate_prompt_tokens"):
            return "echo"
        if first == "prompt_logprobs" and second.startswith("stream"):
            return "prompt_logprobs"
        if (first, second) == ("best_of", "n"):
            return "best_of"
    return None


def given(api: str, *names: str) -> dict[str, Any] | None:
    """None: the two are one field, of which a request has one value."""
    body: dict[str, Any] = {}
    for name in names:
        fields = FEATURES[api][name]
        if any(key in body and body[key] != value for key, value in fields.items()):
            return None
        body |= fields
    base: dict[str, Any] = {
        "chat": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
        "completions": {"prompt": "hi", "max_tokens": 2},
        "responses": {"input": "hi", "max_output_tokens": 2},
    }[api]
    return {"model": MODEL, **base, **body}


@pytest.mark.parametrize(("api", "one"), [(api, name) for api, names in FEATURES.items() for name in names])
def test_every_pair_of_features_works_or_is_refused_by_name(http: Http, api: str, one: str) -> None:
    names = list(FEATURES[api])
    for other in names[names.index(one) :]:
        body = given(api, one, other)
        if body is None:
            continue
        answer = http.post(PATHS[api], body)
        param = refused(one, other)
        if param is None:
            assert answer.status == 200, (one, other, answer.body)
            assert b'"error":{' not in answer.body, (one, other, answer.body)
        else:
            assert (answer.status, answer.error["param"]) == (400, param), (one, other, answer.body)
            assert answer.error["code"] in ("invalid_value", "unsupported_parameter")
