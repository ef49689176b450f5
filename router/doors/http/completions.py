"""POST /v1/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from router.admission import RawRequest
from router.dispatcher import Dispatcher
from router.doors.http.app import Exchange
from router.doors.http.errors import invalid
from router.doors.http.fields import COMPLETIONS, refuse_fields
from router.doors.http.generate import generate
from router.doors.http.logprobs import TokenNames
from router.doors.http.parse import parse
from router.doors.http.sampling import MAX_CHOICES, Common, Int
from router.doors.http.shapes import CompletionShape
from router.errors import CONTEXT_LENGTH

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(Common):
    prompt: Any
    logprobs: Int | None = None
    echo: bool | None = None

    def prompts(self, context_limit_tokens: int) -> list[str | list[int]]:
        """By hand: a union over so many numbers would cost more than tokenizing. Raises ApiError."""
        prompt = self.prompt
        if isinstance(prompt, list) and self.truncate_prompt_tokens is not None:
            kept = self.truncate_prompt_tokens
            prompt = _ends(prompt, kept if 0 < kept < context_limit_tokens else context_limit_tokens)
        if isinstance(prompt, list):
            longest = max([len(prompt), *(len(p) for p in prompt[:MAX_CHOICES] if isinstance(p, list))])
            if longest > context_limit_tokens:
                message = f"the prompt has {longest} tokens and the context limit is {context_limit_tokens}; shorten it"
                raise invalid("prompt", message, CONTEXT_LENGTH)
        if isinstance(prompt, str) or _is_token_ids(prompt):
            return [prompt]
        if isinstance(prompt, list) and len(prompt) > MAX_CHOICES:
            raise invalid("prompt", f"{len(prompt)} prompts, at most {MAX_CHOICES} answers in all; send fewer")
        if isinstance(prompt, list) and prompt and all(isinstance(p, str) or _is_token_ids(p) for p in prompt):
            return prompt
        raise invalid("prompt", "prompt is a string, a list of strings, token ids, or a list of lists of token ids")


def _ends(prompt: list[Any], tokens: int) -> list[Any]:
    """Of token ids, or of lists of them, no more than may be kept: what is cut off costs nothing."""
    if prompt and type(prompt[0]) is int:
        return prompt[-tokens:]
    return [p[-tokens:] if isinstance(p, list) else p for p in prompt]


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(t) is int and 0 <= t < 1 << 32 for t in value)


class CompletionRoutes:
    def __init__(self, dispatcher: Dispatcher, names: TokenNames, limit_bytes: int) -> None:
        self._dispatcher = dispatcher
        self._names = names
        self._limit_bytes = limit_bytes

    async def create(self, exchange: Exchange) -> None:
        body = refuse_fields(await exchange.json_object(self._limit_bytes), COMPLETIONS)
        asked = parse(body, CompletionRequest)
        stream, n, generated, prompts = (
            asked.streams,
            asked.answers,
            asked.generated,
            asked.prompts(self._dispatcher.served_model().context_limit_tokens),
        )
        if len(prompts) * generated > MAX_CHOICES:
            of = f"n = {n}" if generated == n else f"best_of = {generated}"
            raise invalid("prompt", f"{len(prompts)} prompts with {of}; at most {MAX_CHOICES} answers in all")
        if asked.logprobs is not None and not 0 <= asked.logprobs <= 20:
            raise invalid("logprobs", f"logprobs is {asked.logprobs}; use 0..20")
        echoed = asked.logprobs if asked.echo else None
        if stream and echoed is not None:
            raise invalid("echo", "logprobs of an echoed prompt are not part of streams; send stream: false")
        if asked.echo and asked.truncate_prompt_tokens is not None:
            raise invalid("echo", "echo together with truncate_prompt_tokens is not supported; leave one of them out")
        scored = asked.wanted_prompt_logprobs
        only_echo = (
            0 if asked.echo and asked.max_tokens == 0 else None
        )  # the prompt is computed, whatever is said of it
        sampling = asked.sampling(
            max_tokens=asked.max_tokens,
            logprobs=asked.compared(asked.logprobs),
            fill_context=False,
            prompt_logprobs=max((k for k in (scored, echoed, only_echo) if k is not None), default=None),
        )
        sampling = replace(sampling, default_max_tokens=_DEFAULT_MAX_TOKENS)
        common = asked.raw(exchange, sampling)
        shape = CompletionShape(
            exchange.request_id,
            self._dispatcher.shown_name(asked.model),
            self._names if asked.logprobs is not None else None,
            per_prompt=n,
            include_usage=asked.include_usage,
            echo=[self._text(p) for p in prompts for _ in range(n)] if asked.echo else None,
            params={"text": "prompt", "token_ids": "prompt", **asked.params}
            | ({"prompt_logprobs": "logprobs"} if scored is None else {}),
            scores=None if scored is None else (self._names, scored),
            echoed_logprobs=echoed,
            token_ids=bool(asked.return_token_ids),
            skip_special=sampling.skip_special,
        )
        raws = [with_prompt(common, p) for p in prompts]
        await generate(exchange, self._dispatcher, raws, generated, shape, stream, keep=n)

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._dispatcher.tokenizer.decode(prompt)


def with_prompt(raw: RawRequest, prompt: str | list[int]) -> RawRequest:
    return replace(raw, text=prompt) if isinstance(prompt, str) else replace(raw, token_ids=prompt)
