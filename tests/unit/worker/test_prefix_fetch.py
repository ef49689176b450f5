"""A prefix that the other worker holds is pulled and not computed. Whatever goes wrong, the answer is the same."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.types import SamplingParams
from tests.support.pair import BLOCK, LINK, Host, Pair
from tests.support.scripted import expected_answer
from worker.messages import CancelSequence, HandoffRef, PrefixPull, RouterLost, SourceLost, StartSequence

GREEDY = SamplingParams(max_tokens=5)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


FIRST = prompt(40)
SECOND = FIRST + prompt(14, seed=1)


def start(number: int, tokens: list[int], holder: Host | None = None, **pull: float) -> StartSequence:
    one = StartSequence(number, f"r{number}", tokens, [], GREEDY)
    if holder is None:
        return one
    ref = HandoffRef(f"x{number}", holder.peer, "")
    return replace(one, prefix_pull=PrefixPull(ref, int(pull.get("num_tokens", 40)), pull.get("wait_s", 5.0)))


def two_turns(holder: str, *, blocks_per_step: int = 2, **options: float) -> tuple[Pair, Host, Host]:
    """The holder has answered the first turn."""
    pair = Pair(blocks_per_step=blocks_per_step, num_blocks=48, **options)
    has, wants = (pair.p, pair.d) if holder == "prefill" else (pair.d, pair.p)
    pair.to(has, start(1, FIRST))
    pair.run()
    assert has.tokens(1) == expected_answer(FIRST, GREEDY)
    return pair, has, wants


@pytest.mark.parametrize("holder", ["prefill", "decode"])
def test_either_pool_lends_and_either_fetches(holder: str) -> None:
    pair, has, wants = two_turns(holder)
    pair.to(wants, start(2, SECOND, has))
    pair.run()
    assert wants.tokens(2) == expected_answer(SECOND, GREEDY)
    end = wants.end(2)
    assert end is not None
    assert end.cached_tokens == 40, "pulled, not computed"
    assert wants.core.load().prefix_pulls_total == 1
    pair.assert_nothing_left()


def test_a_prefill_worker_fetches_and_hands_over_as_ever() -> None:
    """Turn two of a chat whose first turn decode answered alone."""
    pair, d, p = two_turns("decode")
    serve = replace(start(2, SECOND, d), serve_handoff_id="h2")
    pair.to(d, replace(start(2, SECOND), pull=HandoffRef("h2", p.peer, "")))
    pair.to(p, serve)
    pair.run()
    assert d.tokens(2) == expected_answer(SECOND, GREEDY)
    (adopted,) = pair.adopted()
    assert adopted.cached_tokens == 40, "and decode pulls only what it did not have"
    assert p.core.load().prefix_pulls_total == 1
    pair.assert_nothing_left()


@pytest.mark.parametrize("tokens", [1, 3, 4, 39, 40, 44, 53, 54, 60])
def test_any_length_may_be_asked_for(tokens: int) -> None:
    pair, has, wants = two_turns("prefill")
    pair.to(wants, start(2, SECOND, has, num_tokens=tokens))
    pair.run()
    assert wants.tokens(2) == expected_answer(SECOND, GREEDY)
    end = wants.end(2)
    assert end is not None
    assert end.cached_tokens == min(tokens, 44) // BLOCK * BLOCK or end.cached_tokens == 40
    pair.assert_nothing_left()


def test_what_the_holder_has_not_is_computed() -> None:
    pair, has, wants = two_turns("prefill")
    pair.to(wants, start(2, prompt(30, seed=9), has))
    pair.run()
    assert wants.tokens(2) == expected_answer(prompt(30, seed=9), GREEDY)
    assert wants.core.load().prefix_pull_failures_total == 1
    pair.assert_nothing_left()


def test_another_tenants_prefix_is_never_lent() -> None:
    pair, has, wants = two_turns("prefill")
    pair.to(wants, replace(start(2, SECOND, has), cache_salt="tenant"))
    pair.run()
    end = wants.end(2)
    assert end is not None
    assert end.cached_tokens == 0
    assert wants.tokens(2) == expected_answer(SECOND, GREEDY)
    pair.assert_nothing_left()


def test_nobody_waits_longer_than_computing_would_take() -> None:
    pair, has, wants = two_turns("prefill")
    pair.network.stalled.add(has.peer)
    pair.to(wants, start(2, SECOND, has, wait_s=0.2))
    begun = pair.now
    while wants.end(2) is None:
        pair.turn()
        assert pair.now < begun + 2.0
    assert wants.tokens(2) == expected_answer(SECOND, GREEDY)
    assert wants.core.load().quarantined_blocks > 0, "bytes may still land"
    pair.network.stalled.clear()
    pair.run()
    pair.assert_nothing_left()


@pytest.mark.parametrize("turns", range(8))
def test_the_holder_dies_at_any_moment(turns: int) -> None:
    pair, has, wants = two_turns("prefill", blocks_per_step=1)
    pair.to(wants, start(2, SECOND, has))
    for _ in range(turns):
        pair.turn()
    pair.network.kill(has.peer)
    wants.core.handle(SourceLost(has.peer, "the stream broke"), pair.now)
    pair.cut = True
    pair.run()
    assert wants.tokens(2) == expected_answer(SECOND, GREEDY)
    pair.assert_nothing_left(wants)


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("who", ["request", "router"])
def test_cancel_at_any_moment_leaves_nothing(turns: int, who: str) -> None:
    pair, has, wants = two_turns("decode", blocks_per_step=1)
    pair.to(wants, start(2, SECOND, has))
    for _ in range(turns):
        pair.turn()
    if who == "request":
        pair.to(wants, CancelSequence(2))
    else:
        wants.core.handle(RouterLost(LINK), pair.now)
    pair.run()
    pair.assert_nothing_left()


def test_a_block_that_is_reused_under_the_reader_is_fenced_and_computed() -> None:
    pair, has, wants = two_turns("prefill", blocks_per_step=1)
    pair.network.stalled.add(has.peer)
    pair.to(wants, start(2, SECOND, has))
    for _ in range(5):
        pair.turn()
    reading = next(iter(pair.reader._readings.values()))
    block = reading.tracks[0].remote[1][0]
    has.runner.generations[block] += 1
    has.runner.kv[block] = 0
    pair.network.stalled.clear()
    pair.run()
    assert wants.tokens(2) == expected_answer(SECOND, GREEDY)
    assert wants.core.load().prefix_pull_failures_total == 1


def test_a_holder_whose_leases_are_full_says_so() -> None:
    pair, has, wants = two_turns("prefill", max_leased_blocks=3)
    pair.to(wants, start(2, SECOND, has))
    pair.run()
    assert wants.tokens(2) == expected_answer(SECOND, GREEDY)
    assert wants.core.load().prefix_pull_failures_total == 1
    pair.assert_nothing_left()


def test_no_room_for_the_prefix_is_no_reason_to_wait() -> None:
    pair, has, wants = two_turns("prefill", decode_blocks=18)
    pair.to(wants, StartSequence(9, "r9", prompt(30, 9), [], SamplingParams(max_tokens=20)))
    pair.turn()
    pair.to(wants, start(2, SECOND, has))
    pair.run()
    assert wants.tokens(2) == expected_answer(SECOND, GREEDY)
    pair.assert_nothing_left()


def test_a_holder_that_does_not_answer_is_not_waited_for_again_at_once() -> None:
    pair, has, wants = two_turns("prefill")
    other = prompt(40, seed=3)
    pair.to(has, start(6, other))
    pair.run()
    pair.network.stalled.add(has.peer)
    pair.to(wants, start(2, SECOND, has, wait_s=0.5))
    pair.run(pair.now + 3.0)
    third = other + prompt(10, seed=5)
    begun = pair.now
    pair.to(wants, start(3, third, has, wait_s=5.0))
    while wants.end(3) is None:
        pair.turn()
        assert pair.now < begun + 0.5, "it waits for what did not come a moment ago"
    assert wants.tokens(3) == expected_answer(third, GREEDY)
    pair.network.stalled.clear()
    pair.run()
    for _ in range(1200):
        pair.turn()
    fourth = prompt(20, seed=8)
    pair.to(has, start(4, fourth))
    pair.run()
    pair.to(wants, start(5, [*fourth, *prompt(9, seed=9)], has, num_tokens=20))
    pair.run(pair.now + 5.0)
    assert wants.core.load().prefix_pulls_total == 1, "a while later it is asked again"
    pair.assert_nothing_left()
