"""An HTTP request's answers, between the lives that fill them and the connection that they are written to.

One request may have several answers (`n`, several prompts); each is a Choice and has a Life of its own.

    collecting   tokens gather until all choices are done; one JSON object
    streaming    waits: nothing is sent, so that what fails before the first token still gets its HTTP status
                 open: whoever brings tokens writes them (one write for each step), no task runs
                 paused: the client does not read; tokens gather, up to `max_lag_tokens`
                 over: the task of the request writes what is left and the end

No call waits. The task of the request waits in `changed` for the few moments that matter: the first token, the end, the
loss of the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from router.doors.http.connection import Connection
from router.doors.http.logprobs import Entry, finite
from router.errors import Code, Failure
from router.lifecycle import Life
from router.prompt_logprobs import PromptLogprobs
from router.request import Finish


class Shape(Protocol):
    """How answers look. Stream texts are whole server-sent events."""

    def delta(self, choice: Choice, text: str, entries: list[Entry]) -> str:
        """What a stream says of new tokens; of the first ones, or of none, with what stands before them."""
        ...

    def finish(self, choice: Choice) -> str:
        """What a stream says at the end of one answer."""
        ...


class Choice:
    """One answer, as its Life sees it."""

    def __init__(self, index: int, answer: Answer) -> None:
        self.index = index
        self.life: Life | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        self.reason: Finish | None = None
        self.failure: Failure | None = None
        self.begun = False  # a stream has said something of it
        self.ended = False  # and how it ended
        self.state: Any = None  # the shape's own
        self.said_ids = 0  # tokens whose ids a stream has said
        self._answer = answer
        self._texts: list[str] = []
        self._entries: list[Entry] = []
        self._waiting_tokens = 0

    @property
    def done(self) -> bool:
        return self.reason is not None or self.failure is not None

    # Client.

    def started(self, life: Life) -> None:
        self.life = life
        self.prompt_logprobs = life.prompt_logprobs or self.prompt_logprobs  # a further answer's are the first one's

    def token(self, position: int, token_id: int, text: str, logprobs: Any | None) -> None:
        self._waiting_tokens += 1
        if text:
            self._texts.append(text)
        if logprobs is not None:
            self._entries.append(Entry(token_id, logprobs))

    def finished(self, life: Life, reason: Finish) -> None:
        self.reason = reason
        self._answer.ended()

    def failed(self, life: Life, failure: Failure) -> None:
        self.failure = failure
        self._answer.ended()

    def wake(self) -> None:
        self._answer.has_news(self)

    # Answer.

    @property
    def waiting_tokens(self) -> int:
        return self._waiting_tokens

    @property
    def waiting_logprobs(self) -> int:
        """Tokens with log-probabilities that nobody has taken."""
        return len(self._entries)

    def mean_logprob(self) -> float:
        """Of a token; of an answer whose tokens nobody has taken yet, and that has log-probabilities."""
        return sum(finite(e.logprobs.logprob) for e in self._entries) / max(1, len(self._entries))

    def take(self) -> tuple[str, list[Entry]]:
        """What has come since the last time."""
        texts, entries = self._texts, self._entries
        text = texts[0] if len(texts) == 1 else "".join(texts)
        texts.clear()
        if entries:
            self._entries = []
        self._waiting_tokens = 0
        return text, entries


class Answer:
    """All choices of one HTTP request; `Listener` of its connection."""

    def __init__(self, shape: Shape, count: int, stream: bool, max_lag_tokens: int) -> None:
        self.choices = [Choice(i, self) for i in range(count)]
        self.lost = False  # the client is gone
        self.lagged = False  # the client does not read, and is to be cut off
        self._shape = shape
        self._stream = stream
        self._max_lag_tokens = max_lag_tokens
        self._live = count
        self._connection: Connection | None = None
        self._changed = asyncio.Event()
        self._gathered: list[Choice] | None = None  # with news in this turn of the loop; None: no turn is due
        self._call_soon: Callable[..., Any] = asyncio.get_running_loop().call_soon

    # What the task of the request asks.

    @property
    def failure(self) -> Failure | None:
        """One answer that failed fails them all."""
        if self.lagged:
            return Failure(
                Code.RESOURCE_EXHAUSTED,
                f"the client left {self._max_lag_tokens} tokens unread and is cut off; read faster, or ask for less",
            )
        return next((c.failure for c in self.choices if c.failure is not None), None)

    @property
    def over(self) -> bool:
        return self._live == 0 or self.lost or self.failure is not None

    async def begun(self) -> None:
        """Returns when there is something to say, or when it is over."""
        while not self.over and not any(c.waiting_tokens for c in self.choices):
            await self._change()

    async def ended_or_lost(self) -> None:
        while not self.over:
            await self._change()

    async def client_gone(self) -> None:
        while not self.lost:
            await self._change()

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def open(self, connection: Connection) -> None:
        """The response has begun: from here on tokens are written when they come."""
        if not self.lost:
            self._connection = connection
            self._write(self.choices)

    def rest(self) -> str:
        """What has not been written, and the ends. Only when it is over."""
        self._connection = None
        return "".join(self._news(choice, at_end=True) for choice in self.choices)

    def _news(self, choice: Choice, *, at_end: bool = False) -> str:
        text, entries = choice.take()
        said = self._shape.delta(choice, text, entries) if text or entries or (at_end and not choice.begun) else ""
        if choice.reason is not None and choice.begun and not choice.ended:
            choice.ended = True
            said += self._shape.finish(choice)
        return said

    # What choices say.

    def ended(self) -> None:
        self._live -= 1

    def has_news(self, choice: Choice) -> None:
        """Once for each step."""
        connection = self._connection
        if connection is None or self._live == 0:
            if self._stream or self._live == 0 or choice.failure is not None:
                self._changed.set()
            if connection is None and self._stream:
                self._check_lag(choice)
        elif choice.failure is not None:
            self._changed.set()
        elif connection.write_paused:
            self._check_lag(choice)
        elif len(self.choices) == 1:
            text, entries = choice.take()
            said = self._shape.delta(choice, text, entries) if text or entries else ""
            if said:  # the beginning of what may be a call is not said yet
                connection.write_chunk(said.encode())
        elif self._gathered is None:  # all choices of this step leave in one write
            self._gathered = [choice]
            self._call_soon(self._write_gathered)
        else:
            self._gathered.append(choice)

    def _write_gathered(self) -> None:
        gathered, self._gathered = self._gathered, None
        if gathered and self._connection is not None and not self._connection.write_paused:
            self._write(gathered)

    def _write(self, choices: list[Choice]) -> None:
        assert self._connection is not None
        said = "".join(self._news(choice) for choice in choices)
        if said:
            self._connection.write_chunk(said.encode())

    def _check_lag(self, choice: Choice) -> None:
        if choice.waiting_tokens >= self._max_lag_tokens and not self.lagged and not choice.done:
            self.lagged = True
            self._changed.set()

    # What the connection says.

    def writable(self) -> None:
        if self._connection is not None and not self.over:
            self._write(self.choices)

    def lost_connection(self) -> None:
        self.lost = True
        self._connection = None
        self._changed.set()
