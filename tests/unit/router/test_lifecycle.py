"""A request's life, message by message, with the full outcome."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from router.errors import Code, Failure
from router.legs import RecoveryLimits
from router.lifecycle import Life
from router.placement.policy import Rejection, Route, WorkerKey
from router.request import Finish, LegStart, Request, Sampling

P, P2, D, D2 = WorkerKey("p", 1), WorkerKey("p2", 1), WorkerKey("d", 1), WorkerKey("d2", 1)


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
    sources: list[WorkerKey] = field(default_factory=list)
    readers: list[WorkerKey] = field(default_factory=list)
    budget: int = 10
    max_tokens: int = 5
    emitted: tuple[int, ...] = ()
    lines: list[str] = field(default_factory=list)
    open_legs: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        sampling = Sampling(max_tokens=self.max_tokens, seed=9, stop_token_ids=(99,))
        request = Request("r", [1, 2, 3], sampling, arrived=0.0, deadline=10.0, emitted=self.emitted)
        route = Route(D, P if self.split else None, "test", {})
        self.life = Life(
            request,
            route,
            workers=self,
            client=self,
            text=PlainText(self.stop),
            leg_numbers=itertools.count(1),
            handoff_prefix="r",
            planner=self,
            limits=RecoveryLimits(self.max_attempts, wait_s=1.0),
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

    def cancel(self, worker: WorkerKey, leg: int, reason: str, keep_lease: bool = False) -> None:
        self.say(f"cancel {leg} on {worker.worker_id}" + (", its lease goes on" if keep_lease else ""))

    def follow(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...], pull: tuple[str, WorkerKey]) -> None:
        self.say(f"follow {leg} on {worker.worker_id} from {pull[1].worker_id} with {list(emitted)}")

    def retry_later(self, request_id: str, delay_s: float) -> None:
        self.say("wait")

    # Planner.

    def place(self, request: Request, num_emitted: int, exclude: frozenset[WorkerKey]) -> Route | Rejection:
        return self.elsewhere.pop(0) if self.elsewhere else _nobody(exclude)

    def unlike(self, layout: str) -> frozenset[WorkerKey]:
        return frozenset()

    def another_source(
        self, request: Request, num_emitted: int, decode: WorkerKey, kept_tokens: int, exclude: frozenset[WorkerKey]
    ) -> Route | None:
        return next((Route(decode, p, "split_is_faster", {}) for p in self.sources if p not in exclude), None)

    def another_reader(self, request: Request, source: WorkerKey, exclude: frozenset[WorkerKey]) -> WorkerKey | None:
        return next((d for d in self.readers if d not in exclude), None)

    def may_retry(self, now: float) -> bool:
        return self.budget > 0

    def retried(self, now: float) -> None:
        self.budget -= 1

    def backoff_s(self, waits: int) -> float:
        return 0.1

    def continue_locally(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None:
        self.say(f"continue {leg} on {worker.worker_id} with {list(emitted)}")

    def serve(self, worker: WorkerKey, leg: int, handoff_id: str, most_tokens: int) -> None:
        self.say(f"serve {leg} on {worker.worker_id} as {handoff_id} up to {most_tokens}")

    def freeze(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        self.say(f"freeze {leg} on {worker.worker_id}")

    def keep(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        self.say(f"keep {leg} on {worker.worker_id}")

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
    s.life.start(0.1)
    assert s.lines == ["client: started", "start 2 on p: serve", "start 1 on d: pull from p"]


def test_a_split_request_from_start_to_end() -> None:
    s = begun()
    s.life.on_token(2, 0, 70, None, 1.0)
    s.life.on_end(2, None, 0, 1.0)
    s.life.on_adopted(1, "r/2", 0.8, 3.0, 1.0)
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
    assert s.new() == ["client: 0=70", "client: 1=71", "cancel 2 on p", "cancel 1 on d", "client: finished stop"]
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
    s.life.on_handoff_failed(1, "r/2", "peer_lost", "", 0, 1.2)
    assert s.new() == [], "it was told already"


def test_prefill_lost_after_adoption_changes_nothing() -> None:
    s = begun()
    s.life.on_token(2, 0, 70, None, 1.0)
    s.life.on_adopted(1, "r/2", 1.0, 1.0, 1.0)
    s.life.on_worker_lost(2, "broken stream", 1.1)
    assert s.life.recoveries == 0
    assert [leg.worker for leg in s.life.legs] == [D]


def test_a_broken_handoff_stops_prefill_and_lets_decode_compute() -> None:
    s = begun()
    s.life.on_handoff_failed(1, "r/2", "fenced", "", 0, 1.0)
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
    s.life.on_worker_lost(1, "killed", 1.2)
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
    s.life.on_retry(1.5)
    assert s.new() == ["wait", "wait"]
    s.life.on_retry(2.0)
    assert s.new() == ["client: UNAVAILABLE"]
    s.assert_over()


def test_a_worker_that_appears_in_time_takes_over() -> None:
    s = begun(split=False)
    s.life.on_token(1, 0, 70, None, 1.0)
    s.life.on_worker_lost(1, "killed", 1.0)
    s.elsewhere.append(local(D))
    s.life.on_retry(1.5)
    assert s.new() == ["client: 0=70", "wait", "start 2 on d: local after [70]"]
    s.life.on_retry(1.6)
    assert s.new() == [], "it waits no more"


def test_a_lost_source_is_replaced_when_that_is_quicker() -> None:
    s = begun(sources=[P, P2])
    s.life.on_token(2, 0, 70, None, 1.0)
    s.new()
    s.life.on_worker_lost(2, "killed", 1.1)
    assert s.new() == ["start 3 on p2: serve after [70]", "follow 1 on d from p2 with [70]"]
    s.life.on_handoff_failed(1, "r/2", "peer_lost", "", 0, 1.2)
    assert s.new() == [], "that was about the one before"
    s.life.on_handoff_failed(1, "r/3", "peer_lost", "", 0, 1.3)
    assert s.new() == ["cancel 3 on p2", "continue 1 on d with [70]"], "no third source: decode can always compute"


def test_decode_adopts_while_it_is_told_of_another_source() -> None:
    s = begun(sources=[P2])
    s.life.on_worker_lost(2, "killed", 1.0)
    s.new()
    s.life.on_adopted(1, "r/2", 1.0, 1.0, 1.0)
    assert s.new() == ["cancel 3 on p2"]
    s.life.on_token(1, 0, 70, None, 1.1)
    assert s.new() == ["client: 0=70"]


def test_a_decode_worker_without_room_hands_the_lease_on() -> None:
    s = begun(readers=[D, D2])
    s.life.on_end(2, None, 0, 1.0)
    s.life.on_handoff_failed(1, "r/2", "no_room", "", 0, 1.1)
    assert s.new() == ["cancel 1 on d, its lease goes on", "start 3 on d2: pull from p"]


def test_a_decode_worker_without_room_keeps_it_when_nobody_else_has_any() -> None:
    s = begun(readers=[D])
    s.life.on_handoff_failed(1, "r/2", "no_room", "", 0, 1.1)
    assert s.new() == ["cancel 2 on p", "continue 1 on d with []"]


def test_a_lease_that_nobody_will_read_is_ended() -> None:
    s = begun()
    s.life.on_token(2, 0, 70, None, 1.0)
    s.life.on_end(2, None, 0, 1.0)
    s.new()
    s.life.cancel(1.1)
    assert s.new() == ["cancel 2 on p", "cancel 1 on d", "client: finished cancelled"]


def test_decode_lost_before_adoption_hands_the_lease_on() -> None:
    s = begun(readers=[D2])
    s.life.on_token(2, 0, 70, None, 1.0)
    s.new()
    s.life.on_worker_lost(1, "killed", 1.1)
    assert s.new() == ["start 3 on d2: pull from p"], "from what the source was given, which is no token yet"
    s.life.on_token(3, 0, 70, None, 1.2)
    s.life.on_token(3, 1, 71, None, 1.2)
    assert s.new() == ["client: 1=71"]


def test_moves_beyond_the_first_come_out_of_the_budget() -> None:
    s = begun(split=False, max_attempts=9, budget=1, elsewhere=[local(D2), local(D), local(D2)])
    for leg in (1, 2, 3):
        s.life.on_worker_lost(leg, "killed", 1.0)
    assert s.new() == ["start 2 on d2: local", "start 3 on d: local", "wait"]


def test_a_contradiction_is_never_passed_on() -> None:
    s = begun(elsewhere=[local(D2)])
    s.life.on_token(2, 0, 70, None, 1.0)
    s.life.on_end(2, None, 0, 1.0)
    s.life.on_adopted(1, "r/2", 1.0, 1.0, 1.0)
    s.life.on_token(1, 0, 99, None, 1.1)
    assert s.new() == ["client: 0=70", "cancel 1 on d", "start 3 on d2: local after [70]"]


def test_an_answer_whose_end_was_lost_is_complete() -> None:
    s = begun(split=False)
    for position in range(5):
        s.life.on_token(1, position, 70, None, 1.0)
    s.new()
    s.life.on_worker_lost(1, "killed", 1.1)
    assert s.new() == ["client: finished length"]
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
        s.life.on_adopted(1, "r/2", 1.0, 1.0, 1.0)
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


def test_a_first_token_that_was_the_last_needs_no_decode_when_its_handoff_fails() -> None:
    s = begun(max_tokens=1)
    s.life.on_token(2, 0, 70, None, 1.0)
    s.life.on_error(2, Code.RESOURCE_EXHAUSTED, "too many leased blocks", 1.0)
    assert s.new() == ["client: 0=70", "cancel 1 on d", "client: finished length"]
    s.assert_over()


def test_a_resumed_answer_goes_on_behind_what_was_emitted() -> None:
    s = Story(emitted=(7, 8))
    s.life.start(0.1)
    assert s.life.resumed_text == "7 8 "
    assert s.new() == ["client: started", "start 2 on p: serve after [7, 8]", "start 1 on d: pull from p after [7, 8]"]
    s.life.on_token(2, 2, 9, None, 1.0)
    assert s.life.times.first_token == 1.0
    s.life.on_token(1, 1, 8, None, 1.1)
    assert s.life.duplicates == 1, "what was emitted is law"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"emitted": (7, 99)}, "stop"),
        ({"emitted": (7, 8, 9, 10, 11)}, "length"),
        ({"emitted": (7, 8), "stop": "8"}, "stop"),
    ],
)
def test_a_resumed_answer_that_was_complete_needs_no_worker(options: dict[str, object], reason: str) -> None:
    s = Story(**options)  # type: ignore[arg-type]
    s.life.start(0.1)
    assert s.new() == ["client: started", f"client: finished {reason}"]
    s.assert_over()


@pytest.mark.parametrize("split", [False, True])
def test_a_request_that_is_given_up_is_not_placed_again(split: bool) -> None:
    s = begun(split=split, elsewhere=[local(D2)])
    s.life.on_worker_lost(2 if split else 1, "killed", 1.0, "it was running on two workers that crashed")
    assert s.new()[-1] == "client: INTERNAL"
    s.assert_over()


def test_an_answer_that_is_complete_is_not_given_up() -> None:
    s = begun(split=False)
    s.life.on_token(1, 0, 99, None, 1.0)
    s.new()
    s.life.on_worker_lost(1, "killed", 1.0, "it was running on two workers that crashed")
    assert s.new() == ["client: finished stop"]
    s.assert_over()


def test_what_a_decode_worker_cannot_compute_is_not_placed_again() -> None:
    s = begun(split=False, elsewhere=[local(D2)])
    s.life.on_error(1, Code.INTERNAL, "the model computed no finite logits at position 0", 1.0)
    assert s.new() == ["client: INTERNAL"]
    s.assert_over()
