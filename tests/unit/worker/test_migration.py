"""A running sequence goes on at another worker: both cores, real pools and transports, no network."""

from __future__ import annotations

import pytest

from engine.drafting import Drafted, Drafting
from engine.speculation import Speculation, SpeculationLimits
from engine.types import SamplingParams
from kv_transfer.handoff import Acceptance
from tests.support.pair import FINISHED, LINK, Host, Pair
from tests.support.scripted import expected_answer
from worker.messages import CaughtUp, ContinueLocally, Freeze, KeepRunning, ServeRunning, SourceLost, StartSequence

PROMPT = list(range(1, 12))


def greedy(max_tokens: int = 40, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **options)  # type: ignore[arg-type]


def running(pair: Pair, sampling: SamplingParams, after: int = 5) -> None:
    pair.local(1, PROMPT, sampling)
    while len(pair.d.heard.token_ids) < after:
        pair.turn()


def until_caught_up(pair: Pair) -> CaughtUp:
    for _ in range(100):
        if pair.p.heard.caught_up:
            return pair.p.heard.caught_up[0]
        pair.turn()
    raise AssertionError("the target never had all that stands")


def both_parts(pair: Pair) -> list[int]:
    """What the router sends on: each position once, and no two words on one."""
    said: dict[int, int] = {}
    for host in (pair.d, pair.p):
        for position, token in zip(host.heard.positions, host.heard.token_ids, strict=True):
            assert said.setdefault(position, token) == token
    assert sorted(said) == list(range(len(said)))
    return [said[i] for i in range(len(said))]


def test_it_goes_on_where_the_other_left_off() -> None:
    pair = Pair()
    running(pair, greedy())
    pair.migrate(1)
    told = until_caught_up(pair)
    assert told == CaughtUp(101, "m1")
    before = len(pair.d.heard.token_ids)
    for _ in range(3):
        pair.turn()
    assert len(pair.d.heard.token_ids) == before + 3, "the source goes on until it is frozen"
    pair.to(pair.d, Freeze(1, "m1"))
    pair.run()
    end = pair.d.end(1)
    assert end is not None
    assert (end.reason, end.code) == (None, 0), "handed over"
    assert pair.p.heard.adoptions[0].sequence_id == 101
    assert pair.p.end(101) is not None
    assert pair.p.end(101).reason in FINISHED  # type: ignore[union-attr]
    assert both_parts(pair) == expected_answer(PROMPT, greedy())
    pair.assert_nothing_left()


def test_at_the_most_tokens_it_is_frozen_whoever_says_so() -> None:
    pair = Pair()
    running(pair, greedy())
    pair.migrate(1, spare=6)
    pair.run()
    assert pair.d.end(1) is not None
    assert len(pair.d.tokens(1)) <= 5 + 6 + 1
    assert both_parts(pair) == expected_answer(PROMPT, greedy())
    pair.assert_nothing_left()


@pytest.mark.parametrize("length", range(1, 14))
def test_wherever_in_a_block_it_stands(length: int) -> None:
    pair = Pair()
    running(pair, greedy(), after=length)
    pair.migrate(1)
    until_caught_up(pair)
    pair.to(pair.d, Freeze(1, "m1"))
    pair.run()
    assert both_parts(pair) == expected_answer(PROMPT, greedy())
    pair.assert_nothing_left()


@pytest.mark.parametrize("turns", range(0, 13, 2))
@pytest.mark.parametrize("original", range(14, 24))
def test_wherever_the_original_context_ends(original: int, turns: int) -> None:
    """A sequence that would outgrow it while it is read (engine/longrope.py) is frozen before."""
    pair = Pair(original=original)
    running(pair, greedy())
    pair.migrate(1)
    for _ in range(turns):
        pair.turn()
    pair.to(pair.d, Freeze(1, "m1"))
    pair.run()
    assert both_parts(pair) == expected_answer(PROMPT, greedy())
    assert pair.p.runner.long_rows + pair.d.runner.long_rows > 0
    refused = pair.p.heard.handoff_failures  # it was computed again when it should have been served
    pair.assert_nothing_left(*([pair.d] if refused else ()))


def test_what_is_left_of_a_source_that_was_ahead_is_not_taken_for_short() -> None:
    """The router had heard of fewer tokens than the original context, the source had more, and died."""
    pair = Pair(original=14)
    running(pair, greedy(), after=9)
    pair.migrate(1, heard=3)
    for _ in range(12):
        pair.turn()
    pair.network.kill(pair.d.peer)
    pair.p.core.handle(SourceLost(pair.d.peer, "the stream broke"), pair.now)
    pair.turn()
    assert pair.p.heard.handoff_failures[0].kept_tokens >= 8
    pair.to(pair.p, ContinueLocally(101, pair.d.tokens(1)[:3]))
    for _ in range(200):
        pair.turn()
    assert pair.p.tokens(101) == expected_answer(PROMPT, greedy())[3:]


def test_kept_it_goes_on_as_if_nothing_had_been() -> None:
    pair = Pair()
    running(pair, greedy())
    pair.migrate(1)
    until_caught_up(pair)
    pair.to(pair.d, KeepRunning(1, "m1"))
    pair.run()
    assert pair.d.tokens(1) == expected_answer(PROMPT, greedy())
    assert [f.reason for f in pair.p.heard.handoff_failures] == ["cancelled"]
    pair.assert_nothing_left(pair.d)


def test_a_late_word_about_an_earlier_attempt_is_nothing() -> None:
    pair = Pair()
    running(pair, greedy())
    pair.migrate(1)
    until_caught_up(pair)
    pair.to(pair.d, Freeze(1, "another"), KeepRunning(1, "another"))
    for _ in range(3):
        pair.turn()
    assert pair.d.end(1) is None
    pair.to(pair.d, Freeze(1, "m1"))
    pair.run()
    assert both_parts(pair) == expected_answer(PROMPT, greedy())


def test_an_answer_that_ends_first_ends_where_it_is() -> None:
    pair = Pair()
    running(pair, greedy(max_tokens=8))
    pair.migrate(1)
    pair.run()
    assert pair.d.tokens(1) == expected_answer(PROMPT, greedy(max_tokens=8))
    assert pair.d.end(1).reason in FINISHED  # type: ignore[union-attr]
    assert [f.reason for f in pair.p.heard.handoff_failures] == ["cancelled"]
    pair.assert_nothing_left(pair.d)


def test_without_room_there_it_goes_on_here() -> None:
    pair = Pair(room_wait_s=0.05)
    held = pair.p.pool.allocate(30)
    assert held is not None
    running(pair, greedy())
    pair.migrate(1)
    pair.run()
    assert [f.reason for f in pair.p.heard.handoff_failures] == ["no_room"]
    pair.to(pair.d, KeepRunning(1, "m1"))
    pair.run(120.0)
    assert both_parts(pair) == expected_answer(PROMPT, greedy())
    pair.assert_nothing_left(pair.d)


def test_who_waits_for_room_gives_up_before_the_source_has_to_stop() -> None:
    pair = Pair(room_wait_s=1000.0)
    held = pair.p.pool.allocate(30)
    assert held is not None
    running(pair, greedy())
    pair.migrate(1, spare=16)
    for _ in range(40):
        pair.turn()
        if pair.p.heard.handoff_failures:
            break
    (failed,) = pair.p.heard.handoff_failures
    assert failed.reason == "no_room"
    assert "would have had to stop" in failed.detail
    assert pair.d.end(1) is None, "the source goes on"
    pair.to(pair.d, KeepRunning(1, "m1"))
    pair.run(120.0)
    assert both_parts(pair) == expected_answer(PROMPT, greedy())
    pair.assert_nothing_left(pair.d)


def test_leases_that_are_all_given_out_cost_it_nothing() -> None:
    pair = Pair(max_leased_blocks=2)
    running(pair, greedy())
    pair.migrate(1)
    pair.run()
    assert pair.d.tokens(1) == expected_answer(PROMPT, greedy())
    (failed,) = pair.p.heard.handoff_failures
    assert failed.reason == "source_failed"
    assert "it can never go elsewhere; raise worker.max_leased_share" in failed.detail
    pair.assert_nothing_left(pair.d)


def test_what_waits_or_is_unknown_is_refused_to_the_reader() -> None:
    pair = Pair()
    pair.local(1, PROMPT, greedy())
    pair.migrate(1)
    pair.run()
    assert [f.reason for f in pair.p.heard.handoff_failures] == ["source_failed"]
    assert pair.d.tokens(1) == expected_answer(PROMPT, greedy())


def test_a_cancel_leaves_nothing_on_either_side() -> None:
    from worker.messages import CancelSequence

    pair = Pair()
    running(pair, greedy())
    pair.migrate(1)
    pair.turn()
    pair.to(pair.d, CancelSequence(1))
    pair.to(pair.p, CancelSequence(101))
    pair.run()
    pair.assert_nothing_left()


def test_log_probabilities_come_with_what_the_router_may_not_have_heard() -> None:
    """The source dies with its last words unsaid; the target repeats them."""
    pair = Pair()
    running(pair, greedy(logprobs=2))
    pair.migrate(1)
    until_caught_up(pair)
    pair.to(pair.d, Freeze(1, "m1"))
    pair.run()
    heard = pair.p.heard
    rows = {position: value for _, position, value in heard.logprobs}
    assert sorted(rows) == sorted(heard.positions), "every token that the target says has them"
    theirs = {position: value for _, position, value in pair.d.heard.logprobs}
    assert all(theirs[p] == rows[p] for p in rows.keys() & theirs.keys())


def test_without_a_reader_nobody_waits_for_it() -> None:
    """The target's start was lost, or waits for its grammar: the client does not."""
    pair = Pair()
    running(pair, greedy())
    pair.to(pair.d, ServeRunning(1, "m1", len(PROMPT) + 8))
    pair.run()
    assert pair.d.tokens(1) == expected_answer(PROMPT, greedy())
    pair.assert_nothing_left()


def test_the_next_attempt_need_not_wait_for_the_end_of_the_one_before() -> None:
    """Both words come in one message, and what begins stands before what ends."""
    pair = Pair()
    running(pair, greedy())
    pair.to(pair.d, ServeRunning(1, "gone", 200))
    pair.migrate(1)
    pair.to(pair.d, KeepRunning(1, "gone"))
    until_caught_up(pair)
    pair.to(pair.d, Freeze(1, "m1"))
    pair.run()
    assert pair.p.heard.adoptions
    assert both_parts(pair) == expected_answer(PROMPT, greedy())
    pair.assert_nothing_left()


def speculation_of(host: Host) -> Speculation:
    assert host.engine.speculation is not None
    return host.engine.speculation


def drafting_of(host: Host, sequence_id: int) -> Drafting | None:
    hosted = host.core._by_link[LINK].get(sequence_id)
    return None if hosted is None else host.engine._sequences[hosted.engine_id].drafting


@pytest.mark.parametrize(("method", "expected"), [("lookup", 0.9), ("draft", 0.5)])
def test_what_its_drafts_were_worth_goes_along(method: str, expected: float) -> None:
    """The target drafts at once as the source did; of another method it learns for itself."""
    pair = Pair(speculation=SpeculationLimits(4))
    running(pair, greedy())
    engine_id = pair.d.core._by_link[LINK][1].engine_id
    learned = Acceptance(method, 45.0, 50.0, len(PROMPT) + 5)
    speculation_of(pair.d)._drafted[engine_id] = Drafted(9, 60, 45, learned)
    pair.migrate(1)
    until_caught_up(pair)
    pair.to(pair.d, Freeze(1, "m1"))
    for _ in range(100):
        if (drafting := drafting_of(pair.p, 101)) is not None:
            break
        pair.turn()
    assert drafting is not None
    assert drafting.acceptance(drafting.at) == pytest.approx(expected, abs=0.05)
    assert pair.d.heard.drafted[1] == Drafted(9, 60, 45, learned), "and the router hears of it"
    pair.run()
    assert both_parts(pair) == expected_answer(PROMPT, greedy())
    assert not speculation_of(pair.d)._drafted
    assert not speculation_of(pair.p)._brought
    pair.assert_nothing_left()


@pytest.mark.parametrize("at", [0, len(PROMPT) + 2, 1 << 31])
def test_a_resumed_answer_brings_along_what_the_router_has_heard(at: int) -> None:
    """What is older counts for less, and what claims to be newer than the sequence for no more."""
    pair, answer = Pair(speculation=SpeculationLimits(4)), expected_answer(PROMPT, greedy())
    start = StartSequence(1, "r", PROMPT, answer[:2], greedy(), acceptance=Acceptance("lookup", 90.0, 100.0, at))
    pair.to(pair.d, start)
    while (drafting := drafting_of(pair.d, 1)) is None:
        pair.turn()
    assert 0.85 < drafting.acceptance(drafting.at) < 0.91
    assert (drafting.tried > 95) is (at > 0)
    pair.run()
    assert [*answer[:2], *pair.d.tokens(1)] == answer
    pair.assert_nothing_left()
