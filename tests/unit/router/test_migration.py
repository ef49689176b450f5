"""A running answer goes on elsewhere: the life's side of it, and which answers go where."""

from __future__ import annotations

from typing import Any

import pytest

from router.errors import Code
from router.placement.moves import Candidate, Offers, Reason, Source, choose, priced
from router.placement.policy import Route
from router.placement.view import WorkerKey, WorkerView
from router.request import Finish
from tests.unit.router.test_lifecycle import D2, D, Story


def decoding(**options: Any) -> Story:
    """One answer on d, two tokens in."""
    s = Story(split=False, max_tokens=9, **options)
    s.life.start(0.0)
    s.life.on_token(1, 0, 50, None, 1.0)
    s.life.on_token(1, 1, 51, None, 1.1)
    s.new()
    return s


def moving(**options: Any) -> Story:
    s = decoding(**options)
    assert s.life.migrate(D2, 64, 1000, Reason.LEAVES, 1.2) == ""
    assert s.new() == ["start 2 on d2: pull from d after [50, 51]", "serve 1 on d as r/2 up to 12"]
    return s


def test_the_stream_goes_on_from_the_target_when_it_has_adopted() -> None:
    s = moving()
    s.life.on_token(1, 2, 52, None, 1.3)
    s.life.on_caught_up(2, "r/2", 1.4)
    s.life.on_caught_up(2, "r/2", 1.4)
    s.life.on_token(1, 3, 53, None, 1.5)
    assert s.new() == ["client: 2=52", "freeze 1 on d", "client: 3=53"]
    s.life.on_end(1, None, 3, 1.5)
    s.life.on_adopted(2, "r/2", 1.0, 1.0, 1.6, pulled_bytes=900)
    for position, token in ((2, 52), (3, 53), (4, 54)):  # what it adopted it repeats
        s.life.on_token(2, position, token, None, 1.7)
    assert s.new() == ["client: 4=54"]
    s.life.on_end(2, Finish.LENGTH, 8, 1.8)
    s.assert_over()
    assert s.life.cached_tokens == 3, "of the worker that computed the prompt"
    assert s.life.recoveries == 0
    assert [r.rule for r in s.life.routes] == ["test", "migrated: its worker leaves"]
    (told,) = s.life.breakdown.migrations
    assert (told.outcome, told.frozen_at, told.pulled_bytes) == ("done", 1.4, 900)
    assert told.pause_s == pytest.approx(0.2)


def test_word_of_the_adoption_may_come_before_the_sources_last_one() -> None:
    s = moving()
    s.life.on_caught_up(2, "r/2", 1.4)
    s.life.on_adopted(2, "r/2", 1.0, 1.0, 1.6)
    s.life.on_token(2, 2, 52, None, 1.6)
    s.life.on_token(1, 2, 52, None, 1.7)
    s.life.on_end(1, None, 0, 1.7)
    s.life.on_token(2, 3, 53, None, 1.8)
    assert s.new() == ["freeze 1 on d", "client: 2=52", "client: 3=53"]
    assert not s.life.over


@pytest.mark.parametrize("how", ["error", "lost", "no room", "final word"])
def test_a_target_that_fails_changes_nothing(how: str) -> None:
    s = moving()
    match how:
        case "error":
            s.life.on_error(2, Code.RESOURCE_EXHAUSTED, "its queue is full", 1.3)
        case "final word":
            s.life.on_error(2, Code.INVALID_ARGUMENT, "it knows better", 1.3)
        case "lost":
            s.life.on_worker_lost(2, "gone", 1.3)
        case _:
            s.life.on_handoff_failed(2, "r/2", "no_room", "", 0, 1.3)
    lines = s.new()
    assert lines[-1] == "keep 1 on d"
    s.life.on_token(1, 2, 52, None, 1.4)
    s.life.on_end(1, Finish.STOP, 0, 1.5)
    assert s.new()[-2:] == ["client: 2=52", "client: finished stop"]
    assert s.life.recoveries == 0
    assert s.life.breakdown.migrations[0].outcome not in ("done", "under way")
    s.assert_over()


def test_a_target_that_fails_after_the_handover_is_an_ordinary_loss() -> None:
    s = moving(elsewhere=[Route(D, None, "again", {})])
    s.life.on_end(1, None, 0, 1.3)
    s.life.on_worker_lost(2, "gone", 1.4)
    assert s.new() == ["cancel 1 on d", "start 3 on d: local after [50, 51]"]
    s.life.on_token(3, 2, 52, None, 1.5)
    s.life.on_end(3, Finish.STOP, 0, 1.6)
    s.assert_over()


def test_after_the_handover_another_reader_may_take_the_lease() -> None:
    s = moving(readers=[D])
    s.life.on_end(1, None, 0, 1.3)
    s.life.on_handoff_failed(2, "r/2", "no_room", "", 0, 1.4)
    assert s.new() == ["cancel 2 on d2, its lease goes on", "start 3 on d: pull from d after [50, 51]"]


def test_a_source_that_is_lost_leaves_the_rest_to_the_target() -> None:
    s = moving()
    s.life.on_token(1, 2, 52, None, 1.3)
    s.life.on_worker_lost(1, "gone", 1.4)
    assert s.new() == ["client: 2=52", "continue 2 on d2 with [50, 51, 52]"]
    assert s.life.recoveries == 1


def test_an_answer_that_ends_first_ends_the_move() -> None:
    s = moving()
    s.life.on_token(1, 2, 99, None, 1.3)
    s.life.on_end(1, Finish.STOP, 0, 1.3)
    assert s.new() == ["client: 2=99", "cancel 2 on d2", "client: finished stop"]
    s.assert_over()


def test_a_word_to_keep_that_comes_too_late_costs_a_placement() -> None:
    """The source had handed over when it heard that nobody takes it."""
    s = moving(elsewhere=[Route(D2, None, "again", {})])
    s.life.on_error(2, Code.RESOURCE_EXHAUSTED, "full", 1.3)
    s.life.on_end(1, None, 0, 1.4)
    assert s.new()[-2:] == ["cancel 1 on d", "start 3 on d2: local after [50, 51]"]


@pytest.mark.parametrize("fault", ["cancel", "deadline"])
def test_cancel_and_deadline_end_both_sides(fault: str) -> None:
    s = moving()
    s.life.cancel(1.3) if fault == "cancel" else s.life.on_deadline(10.0)
    lines = s.new()
    assert {"cancel 1 on d", "cancel 2 on d2"} <= set(lines)
    s.assert_over()


def test_what_cannot_move_says_why() -> None:
    s = Story(split=False)
    s.life.start(0.0)
    assert "no token yet" in s.life.migrate(D2, 64, 0, "", 0.5)
    s.life.on_token(1, 0, 50, None, 1.0)
    assert "there already" in s.life.migrate(D, 64, 0, "", 1.1)
    assert s.life.migrate(D2, 64, 0, "", 1.2) == ""
    assert s.life.migrate(D, 64, 0, "", 1.3)


# Which go where.


def view(name: str, free: int = 900, step_ms: float = 20.0, layout: str = "kv") -> WorkerView:
    return WorkerView(WorkerKey(name, 1), 1000, free, 16, 1 << 16, 0, 4, step_ms, 5000.0, 1e9, layout)


def source(*candidates: Candidate, all_of_them: bool = True, relief: int = 0, under_way: int = 0) -> Source:
    reason = Reason.LEAVES if all_of_them else Reason.PRESSURE
    return Source(WorkerKey("old", 1), "kv", reason, 20.0, under_way, all_of_them, candidates, relief)


def test_the_long_go_and_the_short_end_where_they_are() -> None:
    moves = choose([source(Candidate("short", 500, 5), Candidate("long", 500, 5000))], Offers([view("a")], ()))
    assert [m.key for m in moves] == ["long"]
    assert moves[0].estimates["rest_ms"] == 100_000


def test_one_comes_to_a_worker_at_a_time_and_the_longest_first() -> None:
    them = [Candidate(f"{n}", 500, n) for n in (1000, 3000, 2000)]
    moves = choose([source(*them)], Offers([view("a"), view("b"), view("busy")], {WorkerKey("busy", 1)}))
    assert [m.key for m in moves] == ["3000", "2000"]
    assert len({m.target for m in moves}) == 2


def test_nobody_goes_where_it_would_not_fit_or_could_not_be_read() -> None:
    one = Candidate("r", 8000, 1000, not_to=frozenset({WorkerKey("was", 1)}))
    views = [view("full", free=100), view("other", layout="kv2"), view("was"), view("cut")]
    broken = {(WorkerKey("old", 1), WorkerKey("cut", 1))}
    assert choose([source(one)], Offers(views, (), broken)) == []
    assert choose([source(one)], Offers([*views, view("good")], (), broken))[0].target == WorkerKey("good", 1)


def test_relief_takes_no_more_than_is_needed_and_leaves_room_there() -> None:
    them = [Candidate(f"r{n}", 1000, 1000) for n in range(5)]
    targets = [view(f"t{n}") for n in range(5)]
    assert len(choose([source(*them, all_of_them=False, relief=1500)], Offers(targets, ()))) == 2
    nearly = [view("t", free=140)]  # 1000 tokens would fit, but not beside a tenth of the pool
    assert choose([source(*them, all_of_them=False, relief=1500)], Offers(nearly, ())) == []


def test_a_link_carries_a_few_moves_at_a_time() -> None:
    them = [Candidate(f"r{n}", 1000, 1000) for n in range(9)]
    targets = [view(f"t{n}") for n in range(9)]
    assert len(choose([source(*them, under_way=3)], Offers(targets, ()))) == 1


def test_the_room_to_go_on_covers_what_is_sampled_meanwhile() -> None:
    big = priced(Candidate("r", 100_000, 10_000), source(), view("a"), at_any_price=True)
    assert big is not None
    assert big.spare_tokens > 64 + big.estimates["pull_ms"] / 20.0


# What is said of it afterwards.


def test_cached_tokens_are_those_of_the_prompt_in_whatever_order_words_come() -> None:
    s = Story(max_tokens=20)
    s.life.start(0.0)
    s.life.on_token(2, 0, 50, None, 1.0)
    s.life.on_end(2, None, 3, 1.0)
    s.life.on_adopted(1, "r/2", 1.0, 1.0, 1.0)
    assert s.life.cached_tokens == 3
    leg = 1
    for n, target in enumerate((D2, D, D2), start=3):
        assert s.life.migrate(target, 64, 0, "", 1.2) == ""
        s.life.on_adopted(n, f"r/{n}", 1.0, 1.0, 1.3)
        s.life.on_end(leg, None, 0, 1.3)  # what a target found in its cache is none of the client's business
        leg = n
    s.life.on_end(leg, Finish.LENGTH, 0, 2.0)
    assert s.life.cached_tokens == 3


def test_cached_tokens_of_a_local_answer_are_its_first_workers() -> None:
    s = moving()
    s.life.on_adopted(2, "r/2", 1.0, 1.0, 1.3)
    s.life.on_end(1, None, 2, 1.3)
    s.life.on_end(2, Finish.STOP, 0, 1.4)
    assert s.life.cached_tokens == 2


def test_where_it_runs_is_known_after_its_source_was_lost() -> None:
    s = moving()
    s.life.on_worker_lost(1, "gone", 1.4)
    assert s.life.route.decode == D2
    assert s.life.movable is True
    assert s.life.migrate(D, 64, 0, "", 1.5) == ""


def test_a_worker_that_it_only_goes_to_computes_nothing_for_it() -> None:
    s = moving()
    assert s.life.only_arrives(2)
    assert not s.life.only_arrives(1)
    s.life.on_caught_up(2, "r/2", 1.4)
    assert not s.life.only_arrives(2), "it may have begun there, and its word be lost"


def test_a_stop_string_at_the_handover_ends_both_sides() -> None:
    s = moving(stop="52 53")
    s.life.on_token(1, 2, 52, None, 1.3)
    s.life.on_caught_up(2, "r/2", 1.3)
    s.life.on_end(1, None, 0, 1.4)
    s.life.on_adopted(2, "r/2", 1.0, 1.0, 1.5)
    s.life.on_token(2, 2, 52, None, 1.5)
    s.life.on_token(2, 3, 53, None, 1.5)
    assert s.new()[-2:] == ["cancel 2 on d2", "client: finished stop"]
    s.assert_over()


def test_words_to_keep_that_come_too_late_use_up_no_attempt() -> None:
    """The router's own doing, however often: no fault is behind it."""
    s = decoding(elsewhere=[Route(D, None, "again", {})] * 6, budget=0)
    leg = 1
    for _ in range(6):
        assert s.life.migrate(D2, 64, 0, "", 1.2) == ""
        assert s.life.stay("given up")
        s.life.on_end(leg, None, 0, 1.4)  # it had handed over when it heard that
        leg += 2
    s.life.on_token(leg, 2, 52, None, 1.5)
    s.life.on_end(leg, Finish.STOP, 0, 1.6)
    assert s.new()[-2:] == ["client: 2=52", "client: finished stop"]
    s.assert_over()
