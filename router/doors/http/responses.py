"""POST /v1/responses: text in, text out, nothing stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic_core import to_json

from grammar.structured import Kind, Structured
from router.admission import first_of
from router.dispatcher import Dispatcher
from router.doors.http.app import Exchange
from router.doors.http.errors import ApiError, invalid
from router.doors.http.fields import RESPONSES, refuse_fields
from router.doors.http.generate import generate
from router.doors.http.logprobs import TokenNames
from router.doors.http.parse import Body, parse
from router.doors.http.reasoning import Reasoning, reasoning_effort, template_variables
from router.doors.http.response_input import conversation_of, functions_of
from router.doors.http.response_shape import ResponseShape
from router.doors.http.sampling import UNSET_TEMPERATURE, Int, Sampled
from router.doors.http.structured import schema_of
from router.doors.http.tools import asked_for, tools_of
from router.text.chat import Chat

LOGPROBS = "message.output_text.logprobs"
INCLUDED = (  # of output that there is none of here: reasoning items, and what OpenAI's own tools bring
    *("file_search_call.results", "web_search_call.results", "web_search_call.action.sources"),
    *("message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs"),
    "reasoning.encrypted_content",
)
_PARAMS = {"chat": "input", "text": "input", "prompt": "input", "tools_json": "tools", "tool_calls": "input",
           "chat_template_kwargs_json": "chat_template_kwargs", "max_tokens": "max_output_tokens",
           "logprobs": "top_logprobs"}  # fmt: skip


class _TextConfig(Body):
    format: dict[str, Any] | None = None
    verbosity: Any = None


class _StreamOptions(Body):
    include_obfuscation: bool | None = None


class ResponseRequest(Sampled):
    format_param: ClassVar[str] = "text.format"

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    max_output_tokens: Int | None = None
    text: _TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: Int | None = None
    stream_options: _StreamOptions | None = None
    safety_identifier: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    max_tool_calls: Any = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    client_metadata: Any = None
    include_reasoning: Any = None

    def wanted_logprobs(self) -> int | None:
        include = self.include or ()
        unknown = next((i for i in include if i != LOGPROBS and i not in INCLUDED), None)
        if unknown is not None:
            raise invalid("include", f"include {unknown[:100]!r} is not supported; there is {LOGPROBS}")
        top = self.top_logprobs or 0
        if not 0 <= top <= 20:
            raise invalid("top_logprobs", f"top_logprobs is {top}; use 0..20")
        return top if top or LOGPROBS in include else None

    def asked_format(self) -> Structured | None:
        given = self.text.format if self.text is not None else None
        match (given or {}).get("type", "text"):
            case "text":
                return None
            case "json_object":
                return Structured(Kind.JSON_OBJECT)
            case "json_schema":
                return schema_of(given or {}, "text.format")
            case other:
                raise invalid(
                    "text.format.type", f"{str(other)[:100]!r} does not exist; use text, json_object or json_schema"
                )

    def chat(self, tools_json: str, template: str) -> Chat:
        effort = template_variables(reasoning_effort(self.reasoning), "reasoning.effort", template)
        variables = {**effort, **(self.chat_template_kwargs or {})}
        return Chat(
            conversation_of(self.input, self.instructions),
            tools_json,
            template_kwargs_json=to_json(variables).decode() if variables else "",
        )


class ResponseRoutes:
    def __init__(self, dispatcher: Dispatcher, names: TokenNames, limit_bytes: int) -> None:
        self._dispatcher = dispatcher
        self._names = names
        self._limit_bytes = limit_bytes

    async def create(self, exchange: Exchange) -> None:
        body = refuse_fields(await exchange.json_object(self._limit_bytes), RESPONSES)
        asked = parse(body, ResponseRequest)
        logprobs = asked.wanted_logprobs()
        sampling = asked.sampling(max_tokens=asked.max_output_tokens, logprobs=logprobs, fill_context=True)
        functions = functions_of(asked.tools)
        tools = tools_of(functions, asked.tool_choice, asked.parallel_tool_calls, self._dispatcher)
        wanted = asked_for(sampling, tools, _PARAMS | asked.params)
        template = self._dispatcher.tokenizer.chat_template_text
        raw = replace(asked.raw(exchange, wanted.sampling), chat=asked.chat(tools.json, template))
        defaults = self._dispatcher.sampling_defaults
        shape = ResponseShape(
            exchange.request_id,
            self._dispatcher.shown_name(asked.model),
            self._names if logprobs is not None else None,
            echoed={
                "instructions": asked.instructions,
                "max_output_tokens": asked.max_output_tokens,
                "metadata": asked.metadata or {},
                "temperature": first_of(asked.temperature, defaults.temperature, UNSET_TEMPERATURE),
                "top_p": first_of(asked.top_p, defaults.top_p, 1.0),
                "top_logprobs": asked.top_logprobs or 0,
                "text": {"format": (asked.text.format if asked.text is not None else None) or {"type": "text"}},
                "service_tier": asked.service_tier or "default",
                "user": asked.user,
                "prompt_cache_key": asked.prompt_cache_key,
                "safety_identifier": asked.safety_identifier,
                "tool_choice": asked.tool_choice or "auto",
                "tools": [tool for tool in asked.tools or () if tool["type"] == "function"],
                "parallel_tool_calls": asked.parallel_tool_calls is not False,
            },
            params=wanted.params,
            reader=tools.reader,
        )
        try:
            await generate(exchange, self._dispatcher, [raw], 1, shape, bool(asked.stream))
        except ApiError as error:
            raise await wanted.explained(error, self._dispatcher) from None
