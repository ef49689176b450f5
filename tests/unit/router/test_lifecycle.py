"""A request's life, message by message, with the full outcome."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from router.errors import Code, Failure
from router.lifecycle import Finish, LegStart, Life, Request, Sampling
from router.policy import Rejection, Route, WorkerKey

P, D, D2 = WorkerKey("p", 1), WorkerKey("d", 1), WorkerKey("d2", 1)


class PlainText:
    """Text of token n is "n ", stop string optional."""

    def __init__(self, stop: str = "") -> None:
        self.stop, self.stopped, self.all = stop, False, ""

    def push(self, token_id: int) -> str:
        self.all += f"{token_id} "
        self.stopped = bool(self.stop) and self.stop in self.all
        return f"{token_id} "

    def flush(self) -> str:
        return ""


@dataclass
class Story:
    """Records every effect as a line."""

    split: bool = True
    max_attempts: int = 3
    stop: str = ""
    elsewhere: list[Route | Rejection] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    open_legs: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        request = Request("r", [1, 2, 3], Sampling(max_tokens=5, seed=9), arrived=0.0, deadline=10.0)
        route = Route(D, P if self.split else None, "test", {})
        self.life = Life(
            request,
            route,
            workers=self,
            client=self,
            text=PlainText(self.stop),
            leg_numbers=itertools.count(1),
            place=lambda exclude: self.elsewhere.pop(0) if self.elsewhere else _nobody(exclude),
            max_attempts=self.max_attempts,
        )

    def say(self, line: str) -> None:
        self.lines.append(line)

    def new(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    # Workers.

    def start(self, worker: WorkerKey, start: LegStart, prefill_tokens: int) -> None:
        self.open_legs.add(start.leg)
        what = "serve" if start.serve_handoff_id else f"pull from {start.pull[1].worker_id}" if start.pull else "local"
        emitted = f" after {list(start.emitted)}" if start.emitted else ""
        self.say(f"start {start.leg} on {worker.worker_id}: {what}{emitted}")

    def cancel(self, worker: WorkerKey, leg: int, reason: str) -> None:
        self.say(f"cancel {leg} on {worker.worker_id}")

    def continue_locally(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None:
        self.say(f"continue {leg} on {worker.worker_id} with {list(emitted)}")

    def computed(self, worker: WorkerKey, leg: int) -> None:
        pass

    def ended(self, worker: WorkerKey, leg: int) -> None:
        self.open_legs.discard(leg)

    # Client.

    def started(self, life: Life) -> None:
        self.say("client: started")

    def token(self, position: int, token_id: int, text: str, logprobs: object | None) -> None:
        self.say(f"client: {position}={token_id}")

    def finished(self, life: Life, reason: Finish) -> None:
        self.say(f"client: finished {reason.value}")

    def failed(self, life: Life, failure: Failure) -> None:
        self.say(f"client: {failure.code.name}")

    def assert_over(self) -> None:
        assert self.life.over
        assert self.life.legs == ()
        assert self.open_legs == set()


def _nobody(exclude: frozenset[WorkerKey]) -> Rejection:
    return Rejection(Failure(Code.UNAVAILABLE, f"nobody beside {sorted(w.worker_id for w in exclude)}"))


def local(worker: WorkerKey) -> Route:
    return Route(worker, None, "short_on_decode", {})


def begun(**options: object) -> Story:
    s = Story(**options)  # type: ignore[arg-type]
    s.life.start(0.1)
    s.new()
    return s


def test_both_legs_of_a_split_start_at_the_same_moment() -> None:
    s = Story()
    assert s.life.start(0.1) == [2, 1]
    assert s.lines == ["client: started", "start 2 on p: serve", "start 1 on d: pull from p"]


def test_a_split_request_from_start_to_end() -> None:
    s = begun()
    s.life.on_token(2, 0, 70, None, 1.0)
    s.life.on_end(2, None, 0, 1.0)
    s.life.on_adopted(1, 0.8, 3.0)
    s.life.on_token(1, 0, 70, None, 1.1)
    s.life.on_token(1, 1, 71, None, 1.2)
    s.life.on_end(1, Finish.LENGTH, 0, 1.3)
    assert s.new() == ["client: 0=70", "client: 1=71", "client: finished length"]
    assert s.life.duplicates == 1
    assert (s.life.times.first_token, s.life.times.second_token) == (1.0, 1.2)
    s.assert_over()


def test_decode_may_be_quicker_than_the_first_tokens_own_way() -> None:
    s = begun()
    s.life.on_token(1, 0, 70, None, 1.0)
    s.life.on_token(1, 1, 71, None, 1.1)
    s.life.on_token(2, 0, 70, None, 1.2)
    assert s.new() == ["client: 0=70", "client: 1=71"]


def test_a_first_token_that_ends_the_answer_cancels_decode() -> None:
    s = begun()
    s.life.on_token(2, 0, 70, None, 1.0)
    s.life.on_end(2, Finish.STOP, 0, 1.0)
    assert s.new() == ["client: 0=70", "cancel 1 on d", "client: finished stop"]
    s.assert_over()


def test_a_stop_string_ends_both_legs() -> None:
    s = begun(stop="71")
    s.life.on_token(2, 0, 70, None, 1.0)
    s.life.on_token(1, 1, 71, None, 1.1)
    assert s.new() == ["client: 0=70", "client: 1=71", "cancel 1 on d", "cancel 2 on p", "client: finished stop"]
    s.life.on_token(1, 2, 72, None, 1.2)
    assert s.new() == []
    s.assert_over()


@pytest.mark.parametrize("emitted", [0, 1])
def test_prefill_lost_before_handing_over_lets_decode_compute(emitted: int) -> None:
    s = begun()
    if emitted:
        s.life.on_token(2, 0, 70, None, 1.0)
    s.new()
    s.life.on_worker_lost(2, "broken stream", 1.1)
    assert s.new() == [f"continue 1 on d with {[70] * emitted}"]
    assert s.life.recoveries == 1
    s.life.on_handoff_failed(1, "peer_lost", "", 1.2)
    assert s.new() == [], "it was told already"


def test_prefill_lost_after_adoption_changes_nothing() -> None:
    s = begun()
    s.life.on_token(2, 0, 70, None, 1.0)
    s.life.on_adopted(1, 1.0, 1.0)
    s.life.on_worker_lost(2, "broken stream", 1.1)
    assert s.life.recoveries == 0
    assert [leg.worker for leg in s.life.legs] == [D]


def test_a_broken_handoff_stops_prefill_and_lets_decode_compute() -> None:
    s = begun()
    s.life.on_handoff_failed(1, "fenced", "", 1.0)
    assert s.new() == ["cancel 2 on p", "continue 1 on d with []"]
    s.life.on_token(2, 0, 70, None, 1.1)
    assert s.new() == [], "the dropped leg is not heard any more"
    s.life.on_token(1, 0, 70, None, 1.2)
    assert s.new() == ["client: 0=70"]


def test_decode_lost_mid_stream_goes_on_elsewhere_at_the_next_position() -> None:
    s = begun(split=False, elsewhere=[local(D2)])
    s.life.on_token(1, 0, 70, None, 1.0)
    s.life.on_token(1, 1, 71, None, 1.1)
    s.new()
    assert s.life.on_worker_lost(1, "killed", 1.2) == [2]
    assert s.new() == ["start 2 on d2: local after [70, 71]"]
    s.life.on_token(1, 2, 99, None, 1.3)
    s.life.on_token(2, 2, 72, None, 1.4)
    assert s.new() == ["client: 2=72"], "the dead attempt is not heard"
    assert s.life.recoveries == 1


def test_decode_lost_in_a_split_cancels_prefill_too() -> None:
    s = begun(elsewhere=[local(D2)])
    s.life.on_worker_lost(1, "killed", 1.0)
    assert s.new() == ["cancel 2 on p", "start 3 on d2: local"]


def test_a_gap_is_refused() -> None:
    s = begun(split=False, elsewhere=[local(D2)])
    s.life.on_token(1, 1, 71, None, 1.0)
    assert s.new() == ["cancel 1 on d", "start 2 on d2: local"]


def test_attempts_are_bounded_and_the_end_is_an_explicit_error() -> None:
    s = begun(split=False, max_attempts=2, elsewhere=[local(D2), local(D)])
    s.life.on_worker_lost(1, "killed", 1.0)
    s.life.on_worker_lost(2, "killed", 2.0)
    assert s.new() == ["start 2 on d2: local", "client: UNAVAILABLE"]
    s.assert_over()


def test_nowhere_to_go_is_an_explicit_error() -> None:
    s = begun(split=False)
    s.life.on_worker_lost(1, "killed", 1.0)
    assert s.new() == ["client: UNAVAILABLE"]
    s.assert_over()


def test_a_refusal_by_the_worker_reaches_the_client() -> None:
    s = begun(split=False, elsewhere=[local(D2)])
    s.life.on_error(1, Code.INVALID_ARGUMENT, "too long", 1.0)
    assert s.new() == ["client: INVALID_ARGUMENT"]
    s.assert_over()


def test_a_busy_worker_is_not_the_only_one() -> None:
    s = begun(split=False, elsewhere=[local(D2)])
    s.life.on_error(1, Code.RESOURCE_EXHAUSTED, "queue full", 1.0)
    assert s.new() == ["start 2 on d2: local"]
    s.life.on_error(2, Code.RESOURCE_EXHAUSTED, "queue full", 1.0)
    assert s.new() == ["client: RESOURCE_EXHAUSTED"]
    s.assert_over()


@pytest.mark.parametrize("state", ["dispatched", "first token", "handed over", "adopted"])
@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_cancel_and_deadline_in_every_state_end_both_legs(state: str, end: str) -> None:
    s = begun()
    if state != "dispatched":
        s.life.on_token(2, 0, 70, None, 1.0)
    if state in ("handed over", "adopted"):
        s.life.on_end(2, None, 0, 1.0)
    if state == "adopted":
        s.life.on_adopted(1, 1.0, 1.0)
    s.new()
    if end == "cancel":
        s.life.cancel(5.0)
    else:
        s.life.on_deadline(10.0)
    lines = s.new()
    assert lines[-1] == ("client: finished cancelled" if end == "cancel" else "client: DEADLINE_EXCEEDED")
    assert "cancel 1 on d" in lines
    s.assert_over()
    s.life.cancel(6.0)
    s.life.on_deadline(10.0)
    s.life.on_token(1, 1, 71, None, 6.0)
    assert s.new() == [], "an end is an end"
