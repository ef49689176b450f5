"""POST /v1/responses: text in, text out, nothing stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from grammar.structured import Kind, Structured
from router.admission import first_of
from router.dispatcher import Dispatcher
from router.doors.http.app import Exchange
from router.doors.http.chat import ROLES, text_of
from router.doors.http.errors import invalid
from router.doors.http.fields import RESPONSES, refuse_fields
from router.doors.http.generate import generate
from router.doors.http.logprobs import TokenNames
from router.doors.http.parse import Body, parse
from router.doors.http.response_shape import ResponseShape
from router.doors.http.sampling import UNSET_TEMPERATURE, Int, Sampled
from router.doors.http.structured import schema_of
from router.doors.http.tools import tools_of, with_demand
from router.text.chat import MAX_CHAT_MESSAGES, Chat, ChatMessage, ToolCall

_TEXT_PARTS = ("input_text", "output_text", "text")
_LOGPROBS = "message.output_text.logprobs"
_PARAMS = {"chat": "input", "text": "input", "prompt": "input", "tools_json": "tools", "tool_calls": "input",
           "max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}  # fmt: skip


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

    def wanted_logprobs(self) -> int | None:
        unknown = next((i for i in self.include or () if i != _LOGPROBS), None)
        if unknown is not None:
            raise invalid("include", f"include {unknown[:100]!r} is not supported; there is {_LOGPROBS}")
        top = self.top_logprobs or 0
        if not 0 <= top <= 20:
            raise invalid("top_logprobs", f"top_logprobs is {top}; use 0..20")
        return top if top or self.include else None

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

    def chat(self, tools_json: str) -> Chat:
        if not self.input:
            raise invalid("input", "there is no input; send a string, or at least one message")
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        if len(items) > MAX_CHAT_MESSAGES:
            raise invalid("input", f"{len(items)} items, the limit is {MAX_CHAT_MESSAGES}; send fewer")
        messages = [ChatMessage("system", self.instructions)] if self.instructions else []
        for i, item in enumerate(items):
            message = _message(item, f"input[{i}]")
            if message.tool_calls and messages and messages[-1].tool_calls:  # calls made together are one message
                calls = messages[-1].tool_calls + message.tool_calls
                messages[-1] = replace(messages[-1], tool_calls=calls)
            else:
                messages.append(message)
        return Chat(messages, tools_json)

    def functions(self) -> list[dict[str, Any]]:
        """The tools in the form of chat completions. Raises ApiError."""
        wanted = []
        for i, tool in enumerate(self.tools or ()):
            if tool.get("type") != "function":
                kind = str(tool.get("type"))[:100]
                raise invalid(f"tools[{i}].type", f"a tool of type {kind!r} is not supported; send functions")
            wanted.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}})
        return wanted


def _message(item: dict[str, Any], param: str) -> ChatMessage:
    kind = item.get("type", "message")
    match kind:
        case "message":
            _only(item, param, "type", "role", "content", "id", "status", "phase")
            role = ROLES.get(_text(item, "role", param))
            if role is None or role == "tool":
                raise invalid(
                    f"{param}.role", f"role {item['role'][:100]!r} does not exist; use system, user, assistant"
                )
            content = item.get("content")
            if not isinstance(content, str) and not (
                isinstance(content, list) and all(isinstance(p, dict) for p in content)
            ):
                raise invalid(f"{param}.content", f"{param}.content is missing; send text, or a list of parts")
            return ChatMessage(role, text_of(content, f"{param}.content", _TEXT_PARTS))
        case "function_call":
            _only(item, param, "type", "call_id", "name", "arguments", "id", "status")
            call = ToolCall(*(_text(item, name, param) for name in ("call_id", "name", "arguments")))
            return ChatMessage("assistant", tool_calls=(call,))
        case "function_call_output":
            _only(item, param, "type", "call_id", "output", "id", "status")
            output = item.get("output")
            if not isinstance(output, list) or not all(isinstance(p, dict) for p in output):
                output = _text(item, "output", param)
            said = text_of(output, f"{param}.output", _TEXT_PARTS)
            return ChatMessage("tool", said, tool_call_id=_text(item, "call_id", param))
    raise invalid(
        f"{param}.type",
        f"an item of type {str(kind)[:100]!r} is not supported; send message, function_call or function_call_output",
    )


def _text(item: dict[str, Any], name: str, param: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid(f"{param}.{name}", f"{param}.{name} is missing; send a string")
    return value


def _only(item: dict[str, Any], param: str, *known: str) -> None:
    unknown = next((name[:100] for name in item if name not in known), None)
    if unknown is not None:
        raise invalid(f"{param}.{unknown}", f"{param}.{unknown} is not a field that is known here; leave it out")


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
        tools = tools_of(asked.functions(), asked.tool_choice, asked.parallel_tool_calls, self._dispatcher)
        sampling, params = with_demand(sampling, tools, _PARAMS | asked.params)
        raw = replace(asked.raw(exchange, sampling), chat=asked.chat(tools.json))
        defaults = self._dispatcher.sampling_defaults
        shape = ResponseShape(
            exchange.request_id,
            self._dispatcher.model_name,
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
                "tools": asked.tools or [],
                "parallel_tool_calls": asked.parallel_tool_calls is not False,
            },
            params=params,
            reader=tools.reader,
        )
        await generate(exchange, self._dispatcher, [raw], 1, shape, bool(asked.stream))
