"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from router.admission import MAX_CHAT_MESSAGES, RawRequest
from router.dispatcher import Dispatcher
from router.http.app import Exchange
from router.http.errors import ApiError, invalid
from router.http.fields import CHAT, refuse_fields
from router.http.generate import generate
from router.http.logprobs import TokenNames
from router.http.parse import Body, parse
from router.http.sampling import Common, Int, deadline_ms_of, placement_of
from router.http.shapes import ChatShape

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Message(Body):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None


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

    def chat(self) -> list[tuple[str, str]]:
        if not self.messages:
            raise invalid("messages", "there are no messages; send at least one")
        if len(self.messages) > MAX_CHAT_MESSAGES:
            count = len(self.messages)
            raise invalid("messages", f"{count} messages, the limit is {MAX_CHAT_MESSAGES}; send fewer")
        return [_message(m, f"messages[{i}]") for i, m in enumerate(self.messages)]


def _message(message: Message, param: str) -> tuple[str, str]:
    role = _ROLES.get(message.role)
    if role is None:
        shown = message.role[:100]
        raise invalid(f"{param}.role", f"role {shown!r} does not exist; use {', '.join(_ROLES)}")
    if message.content is None:
        raise invalid(f"{param}.content", f"{param}.content is missing; send text")
    return role, text_of(message.content, f"{param}.content")


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
        raw = RawRequest(
            model=named_model(asked),
            chat=asked.chat(),
            sampling=asked.sampling(max_tokens=asked.wanted_max_tokens(), logprobs=logprobs, fill_context=True),
            priority=asked.wanted_priority,
            deadline_ms=deadline_ms_of(exchange.header(b"x-deadline-ms")),
            cache_salt=asked.cache_salt or "",
            placement=placement_of(exchange.header(b"x-diptych-placement")),
        )
        take_request_id(exchange, asked)
        shape = ChatShape(
            exchange.request_id,
            self._dispatcher.model_name,
            self._names if logprobs is not None else None,
            per_prompt=n,
            include_usage=asked.include_usage,
            service_tier=asked.service_tier,
        )
        await generate(exchange, self._dispatcher, [raw], n, shape, stream)


def named_model(asked: Common) -> str:
    if not asked.model:
        raise ApiError(400, "model is missing; /v1/models lists what is served", param="model",
                       code="missing_required_parameter")  # fmt: skip
    return asked.model


def take_request_id(exchange: Exchange, asked: Common) -> None:
    if asked.request_id is not None:
        exchange.name(asked.request_id)
