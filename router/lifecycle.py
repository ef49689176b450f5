"""One request's life: messages in, effects out. No IO, no clock. docs/lifecycle.md draws it.

    LOCAL   one leg: decode computes the prompt and answers
    SPLIT   two legs at the same moment: prefill computes and samples token 0; decode pulls the KV and goes on at 1

What was emitted is law: a token is accepted only at the next position. Lower positions are duplicates (a decode worker
repeats what it adopted) and are dropped; a higher one is a gap and fails its leg. Every recovery goes on from prompt +
emitted tokens, with the same seed, so no position is sampled twice.

Trouble, in the order of what is tried:
    handoff broken, or prefill lost before its token -> decode computes what is missing     (ContinueLeg)
    decode lost                                      -> another decode worker takes over    (StartLeg, attempt + 1)
    nothing left to try                              -> an explicit error
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from router.errors import Code, Failure
from router.policy import Rejection, Route, WorkerKey


class Finish(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Sampling:
    """Every default resolved; fields as ResolvedSampling in worker.proto, and the stop strings that stay here."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """An admitted request. `deadline` is absolute, on the clock that `now` comes from."""

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    arrived: float
    deadline: float
    priority: int = 0
    cache_salt: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class LegStart:
    """What a worker is asked. Exactly one of `serve_handoff_id` and `pull` is set in a split."""

    leg: int
    request: Request
    emitted: tuple[int, ...]
    serve_handoff_id: str = ""
    pull: tuple[str, WorkerKey] | None = None  # handoff id, source


class Workers(Protocol):
    """Effects towards workers; each returns at once."""

    def start(self, worker: WorkerKey, start: LegStart, prefill_tokens: int) -> None: ...

    def cancel(self, worker: WorkerKey, leg: int, reason: str) -> None: ...

    def continue_locally(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None: ...

    def computed(self, worker: WorkerKey, leg: int) -> None: ...

    def ended(self, worker: WorkerKey, leg: int) -> None: ...


class Client(Protocol):
    """Effects towards the client; buffers, never waits."""

    def started(self, life: Life) -> None: ...

    def token(self, position: int, token_id: int, text: str, logprobs: object | None) -> None: ...

    def finished(self, life: Life, reason: Finish) -> None: ...

    def failed(self, life: Life, failure: Failure) -> None: ...


class Text(Protocol):
    stopped: bool

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class LegRole(enum.Enum):
    PREFILL = enum.auto()
    DECODE = enum.auto()


@dataclass(slots=True)
class Leg:
    number: int
    role: LegRole
    worker: WorkerKey
    adopted: bool = False  # decode: has the KV, or computes it itself


@dataclass(slots=True)
class Timeline:
    """Absolute times; None: has not happened."""

    dispatched: float | None = None
    first_token: float | None = None
    second_token: float | None = None
    last_token: float | None = None
    ended: float | None = None


class Life:
    """`place(exclude)` asks the policy for a local route elsewhere (recovery)."""

    def __init__(
        self,
        request: Request,
        route: Route,
        *,
        workers: Workers,
        client: Client,
        text: Text,
        leg_numbers: itertools.count[int],
        place: Callable[[frozenset[WorkerKey]], Route | Rejection],
        max_attempts: int,
    ) -> None:
        self.request = request
        self.route = route
        self.emitted: list[int] = []
        self.cached_tokens = 0
        self.recoveries = 0
        self.duplicates = 0
        self.kv_early_share = 0.0
        self.adopt_ms = 0.0
        self.times = Timeline()
        self.over = False
        self.outcome = "running"
        self._workers = workers
        self._client = client
        self._text = text
        self._leg_numbers = leg_numbers
        self._place = place
        self._max_attempts = max_attempts
        self._attempt = 0
        self._failed_workers: set[WorkerKey] = set()
        self._legs: dict[int, Leg] = {}
        self._was_split = route.split

    # Messages in.

    def start(self, now: float) -> list[int]:
        """Dispatch. Returns the numbers of the legs, here and in the other calls that start any."""
        self.times.dispatched = now
        self._client.started(self)
        return self._dispatch(now)

    def on_token(self, leg_number: int, position: int, token_id: int, logprobs: object | None, now: float) -> list[int]:
        leg = self._legs.get(leg_number)
        if leg is None or self.over:
            return []
        expected = len(self.emitted)
        if position < expected:
            self.duplicates += 1
            return []
        if position > expected:
            self._cancel(leg, "it left a gap")
            return self._leg_failed(leg, f"position {position} came where {expected} was due", now)
        self.emitted.append(token_id)
        times = self.times
        times.last_token = now
        if expected == 0:
            times.first_token = now
            self._workers.computed(leg.worker, leg.number)
        elif expected == 1:
            times.second_token = now
        text = self._text.push(token_id)
        self._client.token(position, token_id, text, logprobs)
        if self._text.stopped:
            self._finish(Finish.STOP, now)
        return []

    def on_end(self, leg_number: int, reason: Finish | None, cached_tokens: int, now: float) -> list[int]:
        """`reason` None: a prefill leg handed over."""
        leg = self._legs.get(leg_number)
        if leg is None or self.over:
            return []
        if leg.role is LegRole.PREFILL or not self._was_split:
            self.cached_tokens = cached_tokens
        self._drop(leg)
        if reason is not None:
            self._finish(reason, now)
        return []

    def on_error(self, leg_number: int, code: Code, message: str, now: float) -> list[int]:
        """A worker ended a leg with an error."""
        leg = self._legs.get(leg_number)
        if leg is None or self.over:
            return []
        self._drop(leg)
        if code in (Code.INVALID_ARGUMENT, Code.DEADLINE_EXCEEDED) and leg.role is LegRole.DECODE:
            self._fail(Failure(code, message), now)
            return []
        return self._leg_failed(leg, message, now, code=code)

    def on_handoff_failed(self, leg_number: int, reason: str, detail: str, now: float) -> list[int]:
        """Decode could not adopt: it computes what is missing. The prefill leg is of no more use."""
        leg = self._legs.get(leg_number)
        if leg is None or self.over or leg.adopted:
            return []
        self._continue_on(leg, f"handoff failed: {reason} {detail}".strip())
        return []

    def on_adopted(self, leg_number: int, kv_early_share: float, adopt_ms: float) -> None:
        leg = self._legs.get(leg_number)
        if leg is not None and not self.over:
            leg.adopted = True
            self.kv_early_share, self.adopt_ms = kv_early_share, adopt_ms
            self._workers.computed(leg.worker, leg.number)

    def on_worker_lost(self, leg_number: int, why: str, now: float) -> list[int]:
        leg = self._legs.get(leg_number)
        if leg is None or self.over:
            return []
        self._drop(leg)
        return self._leg_failed(leg, f"{leg.worker.worker_id} was lost: {why}", now)

    def cancel(self, now: float) -> None:
        if not self.over:
            self._finish(Finish.CANCELLED, now)

    def on_deadline(self, now: float) -> None:
        if not self.over:
            seconds = self.request.deadline - self.request.arrived
            self._fail(
                Failure(
                    Code.DEADLINE_EXCEEDED,
                    f"no complete answer within {seconds:.3g} s ({len(self.emitted)} tokens were sent); "
                    "allow more time, or ask for fewer tokens",
                ),
                now,
            )

    def fail(self, failure: Failure, now: float) -> None:
        if not self.over:
            self._fail(failure, now)

    @property
    def legs(self) -> Sequence[Leg]:
        return tuple(self._legs.values())

    # Dispatch.

    def _dispatch(self, now: float) -> list[int]:
        self._attempt += 1
        emitted = tuple(self.emitted)
        route = self.route
        uncached = int(route.estimates.get("uncached_on_decode_tokens", len(self.request.prompt)))
        decode = self._leg(LegRole.DECODE, route.decode)
        if route.prefill is None:
            decode.adopted = True
            self._workers.start(route.decode, LegStart(decode.number, self.request, emitted), uncached + len(emitted))
            return [decode.number]
        prefill = self._leg(LegRole.PREFILL, route.prefill)
        handoff_id = f"{self.request.request_id}/{decode.number}"
        self._workers.start(
            route.prefill,
            LegStart(prefill.number, self.request, emitted, serve_handoff_id=handoff_id),
            len(self.request.prompt),
        )
        self._workers.start(
            route.decode,
            LegStart(decode.number, self.request, emitted, pull=(handoff_id, route.prefill)),
            0,
        )
        return [prefill.number, decode.number]

    def _leg(self, role: LegRole, worker: WorkerKey) -> Leg:
        leg = Leg(next(self._leg_numbers), role, worker)
        self._legs[leg.number] = leg
        return leg

    # Trouble.

    def _leg_failed(self, leg: Leg, why: str, now: float, code: Code = Code.UNAVAILABLE) -> list[int]:
        """The leg itself is dropped already."""
        self._failed_workers.add(leg.worker)
        if leg.role is LegRole.PREFILL:
            decode = self._find(LegRole.DECODE)
            if decode is not None:
                if not decode.adopted:
                    self._continue_on(decode, why)
                return []
        return self._elsewhere(why, code, now)

    def _continue_on(self, decode: Leg, why: str) -> None:
        prefill = self._find(LegRole.PREFILL)
        if prefill is not None:
            self._cancel(prefill, why)
        self.recoveries += 1
        decode.adopted = True
        self._workers.continue_locally(decode.worker, decode.number, tuple(self.emitted))

    def _elsewhere(self, why: str, code: Code, now: float) -> list[int]:
        """Another decode worker goes on from prompt + emitted tokens."""
        for leg in list(self._legs.values()):
            self._cancel(leg, why)
        if self._attempt >= self._max_attempts:
            self._fail(Failure(code, f"given up after {self._attempt} attempts; the last: {why}", 1000), now)
            return []
        placed = self._place(frozenset(self._failed_workers))
        if isinstance(placed, Rejection):
            hint = placed.failure
            self._fail(Failure(code, f"{why}; no other worker: {hint.message}", max(hint.retry_after_ms, 1000)), now)
            return []
        self.recoveries += 1
        self.route = replace(placed, rule=f"recovered: {placed.rule}")
        return self._dispatch(now)

    def _find(self, role: LegRole) -> Leg | None:
        return next((leg for leg in self._legs.values() if leg.role is role), None)

    # Ends.

    def _finish(self, reason: Finish, now: float) -> None:
        rest = self._text.flush()
        self._close(reason.value, now)
        if rest:
            # Text that was held back belongs to the last token; it travels with no token of its own.
            self._client.token(len(self.emitted), -1, rest, None)
        self._client.finished(self, reason)

    def _fail(self, failure: Failure, now: float) -> None:
        self._close(failure.code.name, now)
        self._client.failed(self, failure)

    def _close(self, outcome: str, now: float) -> None:
        self.over = True
        self.outcome = outcome
        self.times.ended = now
        for leg in list(self._legs.values()):
            self._cancel(leg, outcome)

    def _cancel(self, leg: Leg, reason: str) -> None:
        self._workers.cancel(leg.worker, leg.number, reason)
        self._drop(leg)

    def _drop(self, leg: Leg) -> None:
        if self._legs.pop(leg.number, None) is not None:
            self._workers.ended(leg.worker, leg.number)
