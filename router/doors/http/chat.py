"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import to_json

from router.dispatcher import Dispatcher
from router.doors.http.app import Exchange
from router.doors.http.errors import invalid
from router.doors.http.fields import CHAT, refuse_fields
from router.doors.http.generate import generate
from router.doors.http.logprobs import TokenNames
from router.doors.http.parse import Body, parse
from router.doors.http.sampling import Common, Int
from router.doors.http.shapes import ChatShape
from router.doors.http.tools import tools_of, with_demand
from router.text.chat import MAX_CHAT_MESSAGES, Chat, ChatMessage, ToolCall

_PARAMS = {
    "chat": "messages",
    "text": "messages",
    "prompt": "messages",
    "tools_json": "tools",
    "tool_calls": "messages",
    "chat_template_kwargs_json": "chat_template_kwargs",
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


class _Function(Body):
    name: str
    arguments: str = "{}"


class _ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: _Function


class Message(Body):
    role: str
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[_ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


class ChatRequest(Common):
    messages: list[Message]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    safety_identifier: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    verbosity: Any = None
    include_reasoning: Any = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def wanted_max_tokens(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid("max_tokens", "max_tokens and max_completion_tokens differ; send max_completion_tokens alone")
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def wanted_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise invalid("top_logprobs", "top_logprobs is for logprobs: true; send both, or none")
            return None
        top = self.top_logprobs or 0
        if not 0 <= top <= 20:
            raise invalid("top_logprobs", f"top_logprobs is {top}; use 0..20")
        return top

    def chat(self, tools_json: str) -> Chat:
        if not self.messages:
            raise invalid("messages", "there are no messages; send at least one")
        if len(self.messages) > MAX_CHAT_MESSAGES:
            count = len(self.messages)
            raise invalid("messages", f"{count} messages, the limit is {MAX_CHAT_MESSAGES}; send fewer")
        return Chat(
            [_message(m, f"messages[{i}]") for i, m in enumerate(self.messages)],
            tools_json=tools_json,
            template_kwargs_json=to_json(self.chat_template_kwargs).decode() if self.chat_template_kwargs else "",
        )


def _message(message: Message, param: str) -> ChatMessage:
    role = ROLES.get(message.role)
    if role is None:
        shown = message.role[:100]
        raise invalid(f"{param}.role", f"role {shown!r} does not exist; use {', '.join(ROLES)}")
    if message.tool_calls and role != "assistant":
        raise invalid(f"{param}.tool_calls", "tool_calls are an assistant's; leave them out")
    if (message.tool_call_id is not None) != (role == "tool"):
        raise invalid(f"{param}.tool_call_id", "tool_call_id is for messages of role tool, which need it")
    said = message.content if message.content is not None else message.refusal
    if said is None and not message.tool_calls:
        raise invalid(f"{param}.content", f"{param}.content is missing; send text")
    return ChatMessage(
        role,
        text_of(said or "", f"{param}.content"),
        message.name or "",
        tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ()),
        message.tool_call_id or "",
    )


def text_of(content: str | list[dict[str, Any]], param: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """Of a string, or of parts that are text, joined. Raises ApiError."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        kind, text = part.get("type"), part.get("text")
        if kind not in kinds:
            raise invalid(f"{param}[{i}].type", f"a part of type {str(kind)[:100]!r} is not supported; send text")
        if not isinstance(text, str):
            raise invalid(f"{param}[{i}].text", f"{param}[{i}].text is missing; send a string")
        texts.append(text)
    return "".join(texts)


class ChatRoutes:
    def __init__(self, dispatcher: Dispatcher, names: TokenNames, limit_bytes: int) -> None:
        self._dispatcher = dispatcher
        self._names = names
        self._limit_bytes = limit_bytes

    async def create(self, exchange: Exchange) -> None:
        body = refuse_fields(await exchange.json_object(self._limit_bytes), CHAT)
        asked = parse(body, ChatRequest)
        stream, n = asked.streams, asked.answers
        logprobs = asked.wanted_logprobs()
        sampling = asked.sampling(max_tokens=asked.wanted_max_tokens(), logprobs=logprobs, fill_context=True)
        tools = tools_of(asked.tools, asked.tool_choice, asked.parallel_tool_calls, self._dispatcher)
        sampling, params = with_demand(sampling, tools, _PARAMS | asked.params)
        raw = replace(asked.raw(exchange, sampling), chat=asked.chat(tools.json))
        shape = ChatShape(
            exchange.request_id,
            self._dispatcher.model_name,
            self._names if logprobs is not None else None,
            per_prompt=n,
            include_usage=asked.include_usage,
            service_tier=asked.service_tier,
            params=params,
            reader=tools.reader,
        )
        await generate(exchange, self._dispatcher, [raw], n, shape, stream)
