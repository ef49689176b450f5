"""Where answers over gRPC wait for their client.

A request's tokens wait in a buffer that its Life fills and one writer empties: no task, await or queue per token, one
message per turn of the writer. When the client lags, tokens coalesce; when it lags without end, it is cut off.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import grpc
from diptych.v1 import generate_pb2

from router.doors.grpc.wire import finished_to_wire, prompt_logprobs_to_wire, started_to_wire
from router.errors import Code, Failure
from router.lifecycle import Life
from router.request import Finish
from router.status import abort
from settings.sampling import MAX_PROMPT_LOGPROBS

log = logging.getLogger(__name__)

# Together they stay well below the 4 MiB that a client accepts by default: the columns of a session's response, and
# other content, which may be passed by one event. The largest are log-probabilities of a prompt, 1.3 MB.
_MAX_TOKENS_PER_RESPONSE = 16384
_MAX_BYTES_PER_RESPONSE = 1 << 20
_LOGPROBS_PER_TOKEN = 16  # that wait, and take the memory of one token in a session's columns
_FREE_LOGPROBS = MAX_PROMPT_LOGPROBS  # as many may wait whatever the bound is


class Lag:
    """The bound on what one client may leave unread. Past it the writer is cancelled: it may be stuck in a write."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._writer = asyncio.current_task()
        self.exceeded = False

    def check(self, waiting_tokens: int) -> None:
        if waiting_tokens >= self._max_tokens and not self.exceeded:
            self.exceeded = True
            assert self._writer is not None
            self._writer.cancel("the client does not read")

    async def abort(self, context: grpc.aio.ServicerContext) -> None:
        """In place of the cancellation, which gRPC would not tell the client of."""
        assert self._writer is not None
        self._writer.uncancel()
        failure = Failure(
            Code.RESOURCE_EXHAUSTED,
            f"the client left {self._max_tokens} tokens or events unread and is cut off; read faster, or ask for less",
        )
        try:
            await abort(context, failure)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # gRPC's type for a call that ended meanwhile is not public
            log.info("a client that was cut off is gone: %s", error)


class CallBuffer:
    """One answer of a Generate call. Tokens that pile up while the client lags leave together, in messages that every
    client accepts.

    `lag`: None for one that comes whole.
    `says_logprobs`: False where only their sum is wanted.
    """

    def __init__(
        self, lag: Lag | None, wake: asyncio.Event | None = None, number: int = 0, *, says_logprobs: bool = True
    ) -> None:
        self.lag = lag
        self.life: Life | None = None
        self._number = number
        self._says_logprobs = says_logprobs
        self._logprobs = 0.0
        self._wake = wake or asyncio.Event()
        self._out: list[generate_pb2.GenerateResponse] = []
        self._tokens: generate_pb2.Tokens | None = None
        self._most_bytes = 0  # that `_tokens` may take
        self._texts: list[str] = []
        self._scored: Life | None = None  # whose prompt's log-probabilities have not been sent
        self.waiting_tokens = 0
        self.done = False
        self.failure: Failure | None = None

    # Client.

    def started(self, life: Life) -> None:
        self.life = life
        self._scored = life if life.prompt_logprobs is not None else None
        self._out.append(generate_pb2.GenerateResponse(started=started_to_wire(life), answer=self._number))

    def token(self, position: int, token_id: int, text: str, logprobs: Any | None) -> None:
        tokens = self._tokens
        if tokens is None:
            self._say_prompt()
            response = generate_pb2.GenerateResponse(answer=self._number)
            tokens = self._tokens = response.tokens
            tokens.position = position
            self._out.append(response)
        if token_id >= 0:
            tokens.token_ids.append(token_id)
            self.waiting_tokens += 1
            if self.lag is not None:
                self.lag.check(self.waiting_tokens)
        self._most_bytes += 5
        if text:
            self._texts.append(text)
            self._most_bytes += 4 * len(text)
        if logprobs is not None:
            self._logprobs += logprobs.logprob
            if self._says_logprobs:
                tokens.logprobs.append(logprobs)
                self._most_bytes += 10 + 13 * len(logprobs.top)
        if self._most_bytes >= _MAX_BYTES_PER_RESPONSE:
            self._seal()

    def finished(self, life: Life, reason: Finish) -> None:
        self._seal()
        self._say_prompt()
        finished = finished_to_wire(life, reason)
        if self._number:  # the prompt is counted once
            finished.usage.prompt_tokens = finished.usage.cached_tokens = 0
        self._out.append(generate_pb2.GenerateResponse(finished=finished, answer=self._number))
        self.done = True

    def failed(self, life: Life, failure: Failure) -> None:
        self._seal()
        self.failure = failure
        self.done = True

    def _say_prompt(self) -> None:
        life, self._scored = self._scored, None
        if life is not None and (said := prompt_logprobs_to_wire(life)) is not None:
            self._out.append(generate_pb2.GenerateResponse(prompt_logprobs=said, answer=self._number))

    def wake(self) -> None:
        self._wake.set()

    # Writer.

    def take(self) -> list[generate_pb2.GenerateResponse]:
        """May be nothing when only the end is new."""
        self._seal()
        out, self._out = self._out, []
        self.waiting_tokens = 0
        return out

    @property
    def mean_logprob(self) -> float:
        return self._logprobs / max(1, self.life.answered_tokens if self.life is not None else 0)

    def _seal(self) -> None:
        if self._tokens is not None:
            self._tokens.text = "".join(self._texts)
            self._tokens = None
            self._texts = []
            self._most_bytes = 0


def best(answers: Sequence[CallBuffer], n: int) -> list[generate_pb2.GenerateResponse]:
    """The likeliest by token, likeliest first, numbered as they are given. The first one's usage has the prompt, and
    the tokens of those that are not given.
    """
    given: list[generate_pb2.GenerateResponse] = []
    prompts: list[generate_pb2.GenerateResponse] = []  # log-probabilities, which any of them may have brought
    usage = generate_pb2.Usage()
    for number, answer in enumerate(sorted(answers, key=lambda a: a.mean_logprob, reverse=True)):
        for response in answer.take():
            if response.HasField("prompt_logprobs"):
                response.answer = 0
                prompts.append(response)
                continue
            if response.HasField("finished"):
                said = response.finished.usage
                usage.prompt_tokens += said.prompt_tokens
                usage.cached_tokens += said.cached_tokens
                said.prompt_tokens = said.cached_tokens = 0
                if number >= n:
                    usage.completion_tokens += said.completion_tokens
            if number < n:
                response.answer = number
                given.append(response)
    for response in given:
        if response.HasField("finished"):
            usage.completion_tokens += response.finished.usage.completion_tokens
            response.finished.usage.CopyFrom(usage)
            break
    return [*given[:1], *prompts, *given[1:]]


class _Events:
    """Of a session, in order; `logprobs` of them wait."""

    def __init__(self) -> None:
        self.logprobs = 0
        self.waiting: deque[tuple[generate_pb2.SessionEvent, int]] = deque()

    def append(self, event: generate_pb2.SessionEvent, logprobs: int = 0) -> None:
        self.waiting.append((event, logprobs))
        self.logprobs += logprobs

    def move(self, taken: list[generate_pb2.SessionEvent], room_bytes: int) -> int:
        """Adds those that there is room for to `taken`, and one in any case if it is empty. Returns the room left."""
        while self.waiting:
            event, logprobs = self.waiting[0]
            size = event.ByteSize()
            if size > room_bytes and taken:
                break
            room_bytes -= size
            taken.append(event)
            self.waiting.popleft()
            self.logprobs -= logprobs
        return room_bytes


class SessionBuffer:
    """All requests of one Session: one response per turn of its writer, common tokens in columns.

    Where a reader lags, several responses follow each other. For each handle the order stays:

        first     `started`, and log-probabilities of the prompt
        columns   once all of `first` have left
        rest      once all of the columns have left
    """

    def __init__(self, lag: Lag) -> None:
        self.lag = lag
        self.wake_event = asyncio.Event()
        self.first = _Events()
        self.rest = _Events()
        self._handles: list[int] = []
        self._positions: list[int] = []
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self.request_ids: dict[int, str] = {}  # live handles; "" while being admitted
        self.cancelled: set[int] = set()  # cancelled while being admitted

    @property
    def waiting_tokens(self) -> int:
        """Log-probabilities count by the memory that they take."""
        waiting = len(self._handles) + len(self.first.waiting) + len(self.rest.waiting)
        logprobs = self.first.logprobs + self.rest.logprobs - _FREE_LOGPROBS
        return waiting if logprobs <= 0 else waiting + logprobs // _LOGPROBS_PER_TOKEN

    def take(self) -> generate_pb2.SessionResponse | None:
        if not self._handles and not self.first.waiting and not self.rest.waiting:
            return None
        events: list[generate_pb2.SessionEvent] = []
        room_bytes = self.first.move(events, _MAX_BYTES_PER_RESPONSE)
        if self.first.waiting:
            return generate_pb2.SessionResponse(events=events)
        most = _MAX_TOKENS_PER_RESPONSE
        response = generate_pb2.SessionResponse(
            handles=self._handles[:most],
            positions=self._positions[:most],
            token_ids=self._token_ids[:most],
            texts=self._texts[:most],
        )
        if len(self._handles) > most:
            for column in (self._handles, self._positions, self._token_ids, self._texts):
                del column[:most]
        else:
            self._handles, self._positions, self._token_ids, self._texts = [], [], [], []
            self.rest.move(events, room_bytes)
        if events:
            response.events.extend(events)
        return response

    def event(self, event: generate_pb2.SessionEvent) -> None:
        self.rest.append(event)
        self.wake()

    def wake(self) -> None:
        """Once per request and step. A writer that is stuck in a write cannot look at the bound: so it is done here."""
        self.wake_event.set()
        self.lag.check(self.waiting_tokens)


class SessionClient:
    """One request of a session, as its Life sees it. For one handle, a reader takes columns before events."""

    def __init__(self, handle: int, session: SessionBuffer) -> None:
        self._handle = handle
        self._session = session
        self._scored: Life | None = None  # whose prompt's log-probabilities have not been sent

    def started(self, life: Life) -> None:
        self._scored = life if life.prompt_logprobs is not None else None
        self._session.first.append(generate_pb2.SessionEvent(handle=self._handle, started=started_to_wire(life)))

    def token(self, position: int, token_id: int, text: str, logprobs: Any | None) -> None:
        session = self._session
        if self._scored is not None:
            self._say_prompt()
        if logprobs is not None or token_id < 0:
            tokens = generate_pb2.Tokens(position=position, text=text)
            if token_id >= 0:
                tokens.token_ids.append(token_id)
            count = 0
            if logprobs is not None:
                tokens.logprobs.append(logprobs)
                count = len(logprobs.top)
            session.rest.append(generate_pb2.SessionEvent(handle=self._handle, tokens=tokens), count)
            return
        session._handles.append(self._handle)
        session._positions.append(position)
        session._token_ids.append(token_id)
        session._texts.append(text)

    def _say_prompt(self) -> None:
        life, self._scored = self._scored, None
        if life is not None and (said := prompt_logprobs_to_wire(life)) is not None:
            event = generate_pb2.SessionEvent(handle=self._handle, prompt_logprobs=said)
            self._session.first.append(event, len(said.token_ids) + len(said.top_token_ids))

    def finished(self, life: Life, reason: Finish) -> None:
        self._say_prompt()
        self._session.request_ids.pop(self._handle, None)
        finished = finished_to_wire(life, reason)
        self._session.rest.append(generate_pb2.SessionEvent(handle=self._handle, finished=finished))

    def failed(self, life: Life, failure: Failure) -> None:
        self._session.request_ids.pop(self._handle, None)
        self._session.rest.append(session_error(self._handle, failure))

    def wake(self) -> None:
        self._session.wake()


def session_error(handle: int, failure: Failure) -> generate_pb2.SessionEvent:
    return generate_pb2.SessionEvent(
        handle=handle,
        error=generate_pb2.SessionError(
            code=int(failure.code), message=failure.message, retry_after_ms=failure.retry_after_ms
        ),
    )
