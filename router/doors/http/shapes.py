"""Chat completions and completions as JSON: whole, and as the events of a stream.

A token's event is put together from parts that do not change and its text, escaped: a JSON library would cost ten times
as much. Text is escaped to ASCII, because some clients split events at every character that Unicode calls a line end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

import numpy as np
from pydantic_core import to_json

from router.doors.http.answer import Choice
from router.doors.http.errors import ApiError
from router.doors.http.logprobs import (
    Entry,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
)
from router.doors.http.tools import Reader, new_call_id
from router.lifecycle import Life
from router.prompt_logprobs import Scores
from router.request import Finish
from router.text.tools.events import CallArguments, CallStart, Text, ToolEvent, collect

DONE = "data: [DONE]\n\n"
_REASONS = {Finish.STOP: "stop", Finish.LENGTH: "length"}


def event(value: Any) -> str:
    return f"data: {to_json(value).decode()}\n\n"


def usage_of(choices: Sequence[Choice], per_prompt: int) -> dict[str, Any]:
    """`per_prompt`: so many choices share a prompt, which counts once."""
    prompt = cached = completion = 0
    mixed: list[str] = []
    for i, choice in enumerate(choices):
        life = choice.life
        if life is None:
            continue
        completion += len(life.emitted)
        mixed += [scheme for scheme in life.breakdown.mix.mixed if scheme not in mixed]
        if i % per_prompt == 0:
            prompt += len(life.request.prompt)
            cached += life.cached_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        **({"mixed_weights": mixed} if mixed else {}),
    }


def prompt_ids_of(choice: Choice) -> list[int]:
    assert choice.life is not None
    return np.asarray(choice.life.request.prompt).tolist()


def new_ids_of(choice: Choice) -> list[int]:
    """Those that a stream has not said yet. Text may come later than its tokens, and the last ones may have none."""
    assert choice.life is not None
    ids = choice.life.emitted[choice.said_ids :]
    choice.said_ids += len(ids)
    return ids


def _scored(choice: Choice) -> tuple[Sequence[int], Scores]:
    assert choice.life is not None
    assert choice.prompt_logprobs is not None
    return choice.life.request.prompt, choice.prompt_logprobs.scores()


def _prompt_logprobs(choice: Choice, scores: tuple[TokenNames, int]) -> list[dict[str, dict[str, Any]] | None]:
    prompt, found = _scored(choice)
    names, alternatives = scores
    return prompt_logprobs(prompt, found, alternatives, names)


def scored_entries(choices: Sequence[Choice]) -> int:
    """Log-probabilities of prompts that an answer shows, at most."""
    return sum(choice.prompt_logprobs.entries for choice in choices if choice.prompt_logprobs is not None)


def waiting_entries(choices: Sequence[Choice]) -> int:
    """Log-probabilities of answers' tokens that nobody has taken yet."""
    return sum(c.waiting_logprobs * entries_of_token(c.life) for c in choices if c.life is not None)


def entries_of_token(life: Life) -> int:
    """Log-probabilities that come with a token of the answer."""
    logprobs = life.request.sampling.logprobs
    return 0 if logprobs is None else 1 + logprobs


def error_event(error: ApiError) -> str:
    """The `openai` clients raise an APIError for it, with the message, and whatever follows is not read."""
    return event({"error": error.content()})


class ChatShape:
    repeats = 0

    def __init__(
        self,
        request_id: str,
        model: str,
        names: TokenNames | None,
        *,
        per_prompt: int,
        include_usage: bool,
        service_tier: str | None,
        params: dict[str, str],
        reader: Callable[[], Reader] | None = None,
        token_ids: bool = False,
        scores: tuple[TokenNames, int] | None = None,
    ) -> None:
        """`names`: None without logprobs. `per_prompt`: so many choices share a prompt. `reader`: of tool calls.
        `scores`: the prompt's log-probabilities are said, with so many alternatives; not in a stream.
        """
        self._scores = scores
        self._new_reader = reader
        self._token_ids = token_ids
        self.params = params
        self._per_prompt = per_prompt
        self._include_usage = include_usage
        self._id = f"chatcmpl-{request_id}"
        self._model = model
        self._created = int(time.time())
        self._names = names
        self._tier = service_tier
        self._head = (
            f'data: {{"id":{quoted(self._id)},"object":"chat.completion.chunk","created":{self._created},'
            f'"model":{quoted(model)},'
        )
        if service_tier is not None:
            self._head += f'"service_tier":{quoted(service_tier)},'
        usage = ',"usage":null' if include_usage else ""
        self._tail = f',"finish_reason":null}}]{usage}}}\n\n'
        self._end = f"}}]{usage}}}\n\n"
        self._no_logprobs_tail = f'}},"logprobs":null{self._tail}'

    def delta(self, choice: Choice, text: str, entries: list[Entry]) -> str:
        if not choice.begun:
            choice.begun = True
            choice.state = _ChatState(
                f'{self._head}"choices":[{{"index":{choice.index},"delta":{{',
                self._new_reader() if self._new_reader is not None else None,
            )
            head = choice.state.head
            if self._token_ids and choice.index == 0:
                ids = f'"prompt_token_ids":{to_json(prompt_ids_of(choice)).decode()},'
                head = f"{self._head}{ids}{head[len(self._head) :]}"
            first = f'{head}"role":"assistant","content":""{self._no_logprobs_tail}'
            return first + (self.delta(choice, text, entries) if text or entries else "")
        state: _ChatState = choice.state
        if state.reader is None:
            if not entries and not self._token_ids:
                return f'{state.head}"content":{quoted(text)}{self._no_logprobs_tail}'
            return f'{state.head}"content":{quoted(text)}{self._full_tail(choice, entries)}'
        said = self._events(state, state.reader.push(text))
        return said + (f"{state.head}{self._full_tail(choice, entries)}" if entries or self._token_ids else "")

    def _full_tail(self, choice: Choice, entries: list[Entry]) -> str:
        logprobs = chat_logprobs(entries, self._names) if entries and self._names is not None else None
        return f'}}{self._new_ids(choice)},"logprobs":{to_json(logprobs).decode()}{self._tail}'

    def _new_ids(self, choice: Choice) -> str:
        return f',"token_ids":{to_json(new_ids_of(choice)).decode()}' if self._token_ids else ""

    def _events(self, state: _ChatState, events: list[ToolEvent]) -> str:
        return "".join(f"{state.head}{_delta_of(event)}{self._no_logprobs_tail}" for event in events)

    def finish(self, choice: Choice) -> str:
        reader = choice.state.reader
        rest = self._events(choice.state, reader.finish()) if reader is not None else ""
        return (
            f'{rest}{self._head}"choices":[{{"index":{choice.index},"delta":{{}}{self._new_ids(choice)},"logprobs":null,'
            f'"finish_reason":{quoted(_reason(choice, reader))}{self._end}'
        )

    def end(self, choices: Sequence[Choice]) -> str:
        if not self._include_usage:
            return DONE
        usage = to_json(usage_of(choices, self._per_prompt)).decode()
        return f'{self._head}"choices":[],"usage":{usage}}}\n\n{DONE}'

    error = staticmethod(error_event)

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        answers: list[dict[str, Any]] = []
        for choice in choices:
            text, entries = choice.take()
            logprobs = chat_logprobs(entries, self._names) if self._names is not None else None
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            reader = self._new_reader() if self._new_reader is not None else None
            if reader is not None:
                said, calls = collect([*reader.push(text), *reader.finish()])
                message["content"] = said if said or not calls else None
                if calls:
                    message["tool_calls"] = [
                        {
                            "id": new_call_id(),
                            "type": "function",
                            "function": {"name": call.name, "arguments": call.arguments},
                        }
                        for call in calls
                    ]
            answers.append(
                {
                    "index": choice.index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": _reason(choice, reader),
                }
            )
            if self._token_ids:
                answers[-1]["token_ids"] = new_ids_of(choice)
        whole: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": answers,
            "usage": usage_of(choices, self._per_prompt),
        }
        if self._token_ids:
            whole["prompt_token_ids"] = prompt_ids_of(choices[0])
        if self._scores is not None:
            whole["prompt_logprobs"] = _prompt_logprobs(choices[0], self._scores)
        return whole if self._tier is None else {**whole, "service_tier": self._tier}


@dataclass(slots=True)
class _ChatState:
    """Of one choice of a stream. `head`: its events up to the delta."""

    head: str
    reader: Reader | None


def _delta_of(event: ToolEvent) -> str:
    """Without the braces."""
    match event:
        case Text(text):
            return f'"content":{quoted(text)}'
        case CallStart(index, name):
            call = f'"id":{quoted(new_call_id())},"type":"function","function":{{"name":{quoted(name)},"arguments":""}}'
            return f'"tool_calls":[{{"index":{index},{call}}}]'
        case CallArguments(index, text):
            return f'"tool_calls":[{{"index":{index},"function":{{"arguments":{quoted(text)}}}}}]'


def _reason(choice: Choice, reader: Reader | None) -> str:
    assert choice.reason is not None
    if choice.reason is Finish.STOP and reader is not None and reader.calls:
        return "tool_calls"
    return _REASONS[choice.reason]


class CompletionShape:
    repeats = 0

    def __init__(
        self,
        request_id: str,
        model: str,
        names: TokenNames | None,
        *,
        per_prompt: int,
        include_usage: bool,
        echo: Sequence[str] | None,
        params: dict[str, str],
        token_ids: bool = False,
        skip_special: bool = True,
        scores: tuple[TokenNames, int] | None = None,
        echoed_logprobs: int | None = None,
    ) -> None:
        """`names`: None without logprobs. `echo`: for each choice the prompt's text, or None. `scores`: as in
        ChatShape. `echoed_logprobs`: the prompt's, with so many alternatives, stand before the answer's, if no stream.
        """
        self._scores = scores
        self._echoed_logprobs = echoed_logprobs
        self.params = params
        self._per_prompt = per_prompt
        self._include_usage = include_usage
        self._id = f"cmpl-{request_id}"
        self._model = model
        self._created = int(time.time())
        self._names = names
        self._echo = echo
        self._token_ids = token_ids
        self._skip_special = skip_special
        self._head = (
            f'data: {{"id":{quoted(self._id)},"object":"text_completion","created":{self._created},'
            f'"model":{quoted(model)},"choices":['
        )
        usage = ',"usage":null' if include_usage else ""
        self._tail = f',"finish_reason":null}}]{usage}}}\n\n'
        self._end = f"}}]{usage}}}\n\n"

    def delta(self, choice: Choice, text: str, entries: list[Entry]) -> str:
        if not choice.begun:
            choice.begun = True
            choice.state = self._names.offsets(skip_special=self._skip_special) if self._names is not None else None
            if self._echo is not None:
                text = self._echo[choice.index] + text
            if self._token_ids and choice.index % self._per_prompt == 0:
                ids = f'"prompt_token_ids":{to_json(prompt_ids_of(choice)).decode()}'
                return f'{self._head}{{{ids},"index":{choice.index},"text":{quoted(text)}{self._rest(choice, entries)}'
        if not entries and not self._token_ids:
            return f'{self._head}{{"index":{choice.index},"text":{quoted(text)},"logprobs":null{self._tail}'
        return f'{self._head}{{"index":{choice.index},"text":{quoted(text)}{self._rest(choice, entries)}'

    def _rest(self, choice: Choice, entries: list[Entry]) -> str:
        names = self._names
        logprobs = completion_logprobs(entries, names, choice.state) if entries and names is not None else None
        return f'{self._new_ids(choice)},"logprobs":{to_json(logprobs).decode()}{self._tail}'

    def _new_ids(self, choice: Choice) -> str:
        return f',"token_ids":{to_json(new_ids_of(choice)).decode()}' if self._token_ids else ""

    def finish(self, choice: Choice) -> str:
        assert choice.reason is not None
        return (
            f'{self._head}{{"index":{choice.index},"text":""{self._new_ids(choice)},"logprobs":null,'
            f'"finish_reason":{quoted(_REASONS[choice.reason])}{self._end}'
        )

    def end(self, choices: Sequence[Choice]) -> str:
        if not self._include_usage:
            return DONE
        usage = to_json(usage_of(choices, self._per_prompt)).decode()
        return f'{self._head}],"usage":{usage}}}\n\n{DONE}'

    error = staticmethod(error_event)

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        answers: list[dict[str, Any]] = []
        for choice in choices:
            text, entries = choice.take()
            if self._echo is not None:
                text = self._echo[choice.index] + text
            names = self._names
            logprobs = None
            if names is not None:
                echo = self._echo[choice.index] if self._echo is not None else ""
                offsets = names.offsets(skip_special=self._skip_special, start=len(echo))
                logprobs = completion_logprobs(entries, names, offsets)
                if self._echoed_logprobs is not None:
                    logprobs = echoed_logprobs(*_scored(choice), self._echoed_logprobs, names, logprobs, echo)
            assert choice.reason is not None
            answers.append(
                {
                    "index": choice.index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": _REASONS[choice.reason],
                }
            )
            if self._token_ids:
                answers[-1]["token_ids"] = new_ids_of(choice)
                if choice.index % self._per_prompt == 0:
                    answers[-1]["prompt_token_ids"] = prompt_ids_of(choice)
            if self._scores is not None:
                answers[-1]["prompt_logprobs"] = _prompt_logprobs(choice, self._scores)
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": answers,
            "usage": usage_of(choices, self._per_prompt),
        }
