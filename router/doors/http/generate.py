"""From the router's requests to an HTTP response: the same for every API that answers with text.

submit all choices ── refused? ──> status and error
   │ not a stream: all done ──> one JSON object, or status and error
   │ a stream: first token ──> 200, events as they come ──> finish, usage, [DONE]
   │                           failed meanwhile ──> an event with the error, and the stream ends without [DONE]
   └ the client left, or does not read ──> every choice is cancelled, on every worker
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from router.admission import RawRequest, RawSampling, another
from router.dispatcher import Dispatcher
from router.doors.http.answer import Answer, Choice, Shape
from router.doors.http.app import ClientLeft, Exchange
from router.doors.http.errors import ApiError, invalid, of_failure
from router.doors.http.pieces import json_of
from router.doors.http.shapes import entries_of_token, scored_entries, usage_of, waiting_entries
from router.errors import Code, RequestRefused
from settings.sampling import MAX_PROMPT_LOGPROBS

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would gather a stream until it is over
]
_LAGGARD_GRACE_S = 5.0
MAX_SHOWN = 1 << 18  # log-probabilities in one response: of prompts, and those that its answers may come to
_ENTRY_BYTES = 16  # of text that takes as long to tokenize as to write a log-probability takes
_IN_A_ROW = 8  # choices that are submitted before others have their turn


class ApiShape(Shape, Protocol):
    """What an API adds: whole answers, and how its streams end."""

    params: dict[str, str]  # what its requests call the fields that the router names
    repeats: int  # so often the end of a stream says all log-probabilities again

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]: ...

    def end(self, choices: Sequence[Choice]) -> str: ...

    def error(self, error: ApiError) -> str: ...


async def generate(
    exchange: Exchange,
    dispatcher: Dispatcher,
    raws: Sequence[RawRequest],
    per_prompt: int,
    shape: ApiShape,
    stream: bool,
    *,
    keep: int = 0,
) -> None:
    """Answers the exchange with `per_prompt` choices for each of `raws`, or with the best `keep` of them, where that is
    fewer (never in a stream). `raws` differ in nothing but the prompt. Raises ApiError while nothing is sent.
    """
    if exchange.connection.lost:
        raise ClientLeft
    answer = Answer(shape, len(raws) * per_prompt, stream, dispatcher.config.max_lag_tokens)
    times = shape.repeats if stream else 1
    if (sampling := _fitting(raws[0].sampling, len(answer.choices) * times)) is not raws[0].sampling:
        raws = [replace(raw, sampling=sampling) for raw in raws]
    exchange.connection.listener = answer
    live: list[str] = []

    def cancel_all() -> None:
        for request_id in live:
            dispatcher.cancel(request_id)  # nothing to do for those that ended

    try:
        await _submit(exchange, dispatcher, raws, per_prompt, answer, live, shape, times)
        await (answer.begun() if stream else answer.ended_or_lost())
        if answer.lost:
            return
        if (failure := answer.failure) is not None:
            raise of_failure(failure, shape.params)
        if not stream:
            size = _ENTRY_BYTES * (scored_entries(answer.choices) + waiting_entries(answer.choices))
            body = await dispatcher.beside_loop(size, lambda: _whole(shape, answer.choices, per_prompt, keep))
            await exchange.respond(200, body)
            return
        await exchange.start(200, _STREAM_HEADERS)
        answer.open(exchange.connection)
        await answer.ended_or_lost()
        if not answer.lost:
            await _end_stream(exchange, answer, shape, cancel_all)
    finally:
        exchange.connection.listener = None
        cancel_all()


def _whole(shape: ApiShape, choices: Sequence[Choice], per_prompt: int, keep: int) -> bytes:
    whole = shape.whole(best(choices, per_prompt, keep or per_prompt))
    if 0 < keep < per_prompt:
        whole["usage"] = usage_of(choices, per_prompt)
    return json_of(whole)


def _fitting(s: RawSampling, times: int) -> RawSampling:
    """Without a max_tokens answers get no longer than the log-probabilities of so many may be."""
    if s.logprobs is None or s.max_tokens is not None or not times:
        return s
    room = MAX_SHOWN if s.prompt_logprobs is None else MAX_SHOWN - MAX_PROMPT_LOGPROBS
    return replace(s, most_by_default=max(1, room // (times * (1 + s.logprobs))))


def best(choices: Sequence[Choice], per_prompt: int, keep: int) -> Sequence[Choice]:
    """Of each prompt's choices the `keep` likeliest by token, likeliest first, with the indices that they are given."""
    if keep == per_prompt:
        return choices
    kept: list[Choice] = []
    for first in range(0, len(choices), per_prompt):
        kept += sorted(choices[first : first + per_prompt], key=lambda c: c.mean_logprob(), reverse=True)[:keep]
    for i, choice in enumerate(kept):
        choice.index = i
    return kept


async def _submit(
    exchange: Exchange,
    dispatcher: Dispatcher,
    raws: Sequence[RawRequest],
    per_prompt: int,
    answer: Answer,
    live: list[str],
    shape: ApiShape,
    times: int,
) -> None:
    """`times`: so often the log-probabilities of the answers stand in the response, or what is its end."""
    trace_context = {
        name: exchange.header(name.encode()) for name in ("traceparent", "tracestate") if exchange.header(name.encode())
    }
    try:
        shown = 0
        for i, choice in enumerate(answer.choices):
            raw, which = replace(raws[i // per_prompt], answers=per_prompt), i % per_prompt
            if which:
                known = answer.choices[i - which].life
                assert known is not None
                raw = another(raw, which, known.request)
            elif i and raw.sampling is raws[0].sampling and (known := answer.choices[0].life) is not None:
                raw = replace(raw, bad_words=known.request.sampling.bad_words)
            named = exchange.request_id if i == 0 else f"{exchange.request_id}-{i}"
            live.append(await _submit_one(dispatcher, replace(raw, request_id=named), choice, trace_context))
            if which:
                choice.prompt_logprobs = answer.choices[i - which].prompt_logprobs
            if i == 0:
                shown = _shown_of_answers(choice, len(answer.choices) * times, shape)
            shown += scored_entries([choice])
            if shown > MAX_SHOWN:
                why = f"the response would have more than {MAX_SHOWN} log-probabilities; send several requests"
                raise invalid(shape.params.get("prompt_logprobs", "prompt_logprobs"), why)
            if i % _IN_A_ROW == _IN_A_ROW - 1:
                await asyncio.sleep(0)
            if answer.lost or answer.failure is not None:
                return
    except RequestRefused as error:
        raise of_failure(error.failure, shape.params) from None


def _shown_of_answers(first: Choice, times: int, shape: ApiShape) -> int:
    """Log-probabilities that so many answers like the first may come to. Raises ApiError where those are too many."""
    assert first.life is not None
    tokens, each = first.life.request.sampling.max_tokens, entries_of_token(first.life)
    if (shown := times * tokens * each) > MAX_SHOWN:
        why = (
            f"{times} x {tokens} tokens with {each} log-probabilities each may come to {shown}, and a response has at "
            f"most {MAX_SHOWN}; lower max_tokens, or ask for fewer answers or alternatives"
        )
        raise invalid(shape.params.get("max_tokens", "max_tokens"), why)
    return shown


async def _submit_one(dispatcher: Dispatcher, raw: RawRequest, choice: Choice, trace_context: dict[str, str]) -> str:
    try:
        return await dispatcher.submit(raw, choice, trace_context=trace_context)
    except RequestRefused as error:
        if error.failure.code is not Code.ALREADY_EXISTS:
            raise
    # Two requests may well come with one x-request-id, for example when a client tries again.
    return await dispatcher.submit(replace(raw, request_id=""), choice, trace_context=trace_context)


async def _end_stream(exchange: Exchange, answer: Answer, shape: ApiShape, cancel_all: Callable[[], None]) -> None:
    rest, failure = answer.rest(), answer.failure
    if failure is None:
        await exchange.send_last(f"{rest}{shape.end(answer.choices)}".encode())
        return
    last = f"{rest}{shape.error(of_failure(failure, shape.params))}".encode()
    if not answer.lagged:
        await exchange.send_last(last)
        return
    # `send` would wait until the client reads: so it is written past it, and the connection ends soon either way.
    cancel_all()
    exchange.connection.write_chunk(last)
    exchange.connection.close_soon(_LAGGARD_GRACE_S)
    await answer.client_gone()
