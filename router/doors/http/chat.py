"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic_core import to_json

from router.dispatcher import Dispatcher
from router.doors.http.app import Exchange
from router.doors.http.errors import ApiError, invalid
from router.doors.http.fields import CHAT, refuse_fields
from router.doors.http.generate import generate
from router.doors.http.logprobs import TokenNames
from router.doors.http.messages import Message, messages_of
from router.doors.http.parse import parse
from router.doors.http.reasoning import template_variables
from router.doors.http.sampling import Common, Int
from router.doors.http.shapes import ChatShape
from router.doors.http.tools import asked_for, tools_of
from router.text.chat import Chat

PARAMS = {
    "chat": "messages",
    "text": "messages",
    "prompt": "messages",
    "tools_json": "tools",
    "tool_calls": "messages",
    "chat_template_kwargs_json": "chat_template_kwargs",
}


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
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

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

    def chat(self, tools_json: str, template: str) -> Chat:
        effort = template_variables(self.reasoning_effort, "reasoning_effort", template)
        variables = {**effort, **(self.chat_template_kwargs or {})}
        return Chat(
            messages_of(self.messages),
            tools_json=tools_json,
            template_kwargs_json=to_json(variables).decode() if variables else "",
            generation_prompt=self.add_generation_prompt,
            continue_final=bool(self.continue_final_message),
        )


class ChatRoutes:
    def __init__(self, dispatcher: Dispatcher, names: TokenNames, limit_bytes: int) -> None:
        self._dispatcher = dispatcher
        self._names = names
        self._limit_bytes = limit_bytes

    async def create(self, exchange: Exchange) -> None:
        body = refuse_fields(await exchange.json_object(self._limit_bytes), CHAT)
        asked = parse(body, ChatRequest)
        stream, n, generated = asked.streams, asked.answers, asked.generated
        logprobs = asked.wanted_logprobs()
        scored, compared = asked.wanted_prompt_logprobs, asked.compared(logprobs)
        sampling = asked.sampling(
            max_tokens=asked.wanted_max_tokens(), logprobs=compared, fill_context=True, prompt_logprobs=scored
        )
        tools = tools_of(asked.tools, asked.tool_choice, asked.parallel_tool_calls, self._dispatcher)
        wanted = asked_for(sampling, tools, PARAMS | asked.params)
        template = self._dispatcher.tokenizer.chat_template_text
        raw = replace(asked.raw(exchange, wanted.sampling), chat=asked.chat(tools.json, template))
        shape = ChatShape(
            exchange.request_id,
            self._dispatcher.shown_name(asked.model),
            self._names if logprobs is not None else None,
            per_prompt=n,
            include_usage=asked.include_usage,
            service_tier=asked.service_tier,
            params=wanted.params,
            reader=tools.reader,
            token_ids=bool(asked.return_token_ids),
            scores=None if scored is None else (self._names, scored),
        )
        try:
            await generate(exchange, self._dispatcher, [raw], generated, shape, stream, keep=n)
        except ApiError as error:
            raise await wanted.explained(error, self._dispatcher) from None
