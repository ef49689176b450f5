"""/tokenize and /detokenize, in vLLM's shape."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from pydantic_core import to_json

from router.admission import RawRequest, check_before_tokenizing
from router.dispatcher import Dispatcher
from router.doors.http.app import Exchange
from router.doors.http.chat import PARAMS
from router.doors.http.errors import invalid, of_failure
from router.doors.http.fields import TOKENIZE, refuse_fields
from router.doors.http.messages import Message, messages_of
from router.doors.http.parse import Body, parse
from router.errors import CONTEXT_LENGTH, RequestRefused
from router.text.chat import Chat

_PARAMS = {**PARAMS, "text": "prompt"}


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    def chat(self, messages: list[Message]) -> Chat:
        """Raises ApiError."""
        variables = self.chat_template_kwargs
        return Chat(
            messages_of(messages),
            to_json(self.tools).decode() if self.tools else "",
            to_json(variables).decode() if variables else "",
            self.add_generation_prompt,
            bool(self.continue_final_message),
        )


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


class TextRoutes:
    def __init__(self, dispatcher: Dispatcher, limit_bytes: int) -> None:
        self._dispatcher = dispatcher
        self.limit_bytes = limit_bytes

    async def tokenize(self, exchange: Exchange) -> None:
        asked = parse(refuse_fields(await exchange.json_object(self.limit_bytes), TOKENIZE), TokenizeRequest)
        if (asked.prompt is None) == (asked.messages is None):
            raise invalid("prompt", "send either prompt or messages")
        chat = None if asked.messages is None else asked.chat(asked.messages)
        raw = RawRequest(model=asked.model or "", text=asked.prompt, chat=chat)
        model = self._dispatcher.served_model()
        try:
            check_before_tokenizing(raw, self._dispatcher.config, model)
            tokens = list(await self._dispatcher.tokens_of(raw, add_special_tokens=asked.add_special_tokens))
        except RequestRefused as error:
            raise of_failure(error.failure, _PARAMS) from None
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": model.context_limit_tokens,
            "tokens": tokens,
        }
        if asked.return_token_strs:
            name = self._dispatcher.tokenizer.backend.id_to_token
            answer["token_strs"] = await self._dispatcher.aside(len(tokens) * 4, lambda: [name(t) for t in tokens])
        await exchange.respond_json(answer)

    async def detokenize(self, exchange: Exchange) -> None:
        asked = parse(await exchange.json_object(self.limit_bytes), DetokenizeRequest)
        model = self._dispatcher.served_model()
        check_before_tokenizing(RawRequest(model=asked.model or "", token_ids=[0]), self._dispatcher.config, model)
        if len(asked.tokens) > model.context_limit_tokens:
            limit = model.context_limit_tokens
            raise invalid(
                "tokens",
                f"{len(asked.tokens)} tokens, the context limit is {limit}; send fewer at a time",
                CONTEXT_LENGTH,
            )
        bad = next((t for t in asked.tokens if not 0 <= t < model.vocab_size), None)
        if bad is not None:
            raise invalid("tokens", f"token id {bad} is not in the model's vocabulary of {model.vocab_size}")
        text = await self._dispatcher.aside(
            len(asked.tokens) * 4, lambda: self._dispatcher.tokenizer.backend.decode(asked.tokens, False)
        )
        await exchange.respond_json({"prompt": text})
