"""One prefill and one decode worker, step by step. After every story nothing is left."""

from __future__ import annotations

import random

import pytest

from engine.types import FinishReason, SamplingParams
from tests.support.pair import BLOCK, Pair
from tests.support.scripted import expected_answer
from worker.messages import (
    CancelSequence,
    Code,
    ContinueLocally,
    Drain,
    FollowAnother,
    HandoffRef,
    RouterLost,
    StartSequence,
)

GREEDY = SamplingParams(max_tokens=6)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 31, 60])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(max_tokens=6, temperature=1.0, seed=3)])
def test_split_answers_what_one_engine_answers(length: int, sampling: SamplingParams) -> None:
    pair = Pair()
    pair.split(1, prompt(length), sampling)
    pair.run()
    expected = expected_answer(prompt(length), sampling)
    assert pair.p.tokens(1) == expected[:1]
    assert pair.d.tokens(1) == expected, "the decode worker repeats the first token and goes on"
    p_end, d_end = pair.p.end(1), pair.d.end(1)
    assert p_end is not None
    assert p_end.reason is None
    assert d_end is not None
    assert d_end.reason is FinishReason.LENGTH
    pair.assert_nothing_left()


@pytest.mark.parametrize("length", [9, 15, 16, 17, 18, 24])
def test_split_and_local_agree_around_the_original_context(length: int) -> None:
    """Where sequences beyond it have another rotary table: the decode worker computes anew what outgrows it there."""
    pair = Pair(original=17)
    pair.split(1, prompt(length), GREEDY)
    pair.local(2, prompt(length), GREEDY)
    pair.run()
    expected = expected_answer(prompt(length), GREEDY)
    assert (pair.d.tokens(1), pair.d.tokens(2)) == (expected, expected)
    assert bool(pair.p.runner.long_rows) is (length > 17)
    assert bool(pair.d.runner.long_rows) is (length + 5 > 17)
    turn = prompt(length) + expected + [1, 2]
    pair.split(3, turn, GREEDY)
    pair.run()
    assert pair.d.tokens(3) == expected_answer(turn, GREEDY)
    pair.assert_nothing_left()


def test_kv_moves_while_the_prompt_is_computed() -> None:
    pair = Pair(blocks_per_step=8)
    pair.split(1, prompt(60), GREEDY)
    pair.run()
    (adopted,) = pair.adopted()
    assert adopted.kv_early_share > 0.7


def test_the_first_token_does_not_wait_for_the_transfer() -> None:
    pair = Pair()
    pair.network.stalled.add(pair.p.peer)
    pair.split(1, prompt(40), GREEDY)
    for _ in range(40):
        pair.turn()
    assert pair.p.tokens(1) == expected_answer(prompt(40), GREEDY)[:1]
    assert pair.adopted() == []
    pair.network.stalled.clear()
    pair.run()
    assert pair.d.tokens(1) == expected_answer(prompt(40), GREEDY)
    pair.assert_nothing_left()


def test_a_second_turn_pulls_only_what_decode_does_not_have() -> None:
    pair = Pair()
    pair.split(1, prompt(24), GREEDY)
    pair.run()
    pair.split(2, prompt(24) + prompt(8, seed=1), GREEDY)
    pair.run()
    first, second = pair.adopted()
    assert first.pulled_bytes == 6 * BLOCK * 8
    assert second.pulled_bytes == 2 * BLOCK * 8
    assert second.cached_tokens == 24
    assert pair.d.tokens(2) == expected_answer(prompt(24) + prompt(8, seed=1), GREEDY)


def test_a_first_token_that_ends_the_answer_is_never_adopted() -> None:
    first = expected_answer(prompt(10), GREEDY)[0]
    for sampling in (SamplingParams(max_tokens=1), SamplingParams(max_tokens=6, stop_token_ids=frozenset([first]))):
        pair = Pair()
        pair.split(1, prompt(10), sampling)
        pair.run(until_s=1.0)
        end = pair.p.end(1)
        assert end is not None
        assert end.reason is not None
        pair.to(pair.d, CancelSequence(1))  # as the router does
        pair.run()
        assert pair.d.tokens(1) == []
        pair.assert_nothing_left()


def test_many_at_once_with_little_memory() -> None:
    """Preemption, waiting for room and shared prefixes together; no circle, every answer exact."""
    pair = Pair(blocks_per_step=2, num_blocks=40, decode_blocks=30)
    for i in range(12):
        pair.split(i, prompt(10 + i, seed=i % 5), GREEDY) if i % 3 else pair.local(
            i, prompt(10 + i, seed=i % 5), GREEDY
        )
    for _ in range(3000):
        pair.turn()
        for failure in pair.failures():  # the router's answer to a handoff that found no room
            pair.to(pair.d, ContinueLocally(failure.sequence_id, pair.p.tokens(failure.sequence_id)))
        pair.d.heard.handoff_failures.clear()
    for i in range(12):
        expected = expected_answer(prompt(10 + i, seed=i % 5), GREEDY)
        tokens = pair.d.tokens(i)
        assert tokens == expected[len(expected) - len(tokens) :]
        assert pair.d.end(i) is not None
    pair.assert_nothing_left()


# Trouble.


def continued(pair: Pair, sequence_id: int = 1) -> None:
    """The router tells decode to compute what is missing, with the tokens that it has."""
    pair.to(pair.d, ContinueLocally(sequence_id, pair.p.tokens(sequence_id)))


def assert_exact_after(pair: Pair, length: int, sampling: SamplingParams = GREEDY) -> None:
    expected = expected_answer(prompt(length), sampling)
    known = pair.p.tokens(1)
    tail = pair.d.tokens(1)
    assert known + tail == expected or tail == expected


@pytest.mark.parametrize("turns", range(0, 30, 3))
def test_prefill_dies_at_any_moment(turns: int) -> None:
    pair = Pair()
    pair.split(1, prompt(40), GREEDY)
    for _ in range(turns):
        pair.turn()
    pair.lose_source()
    p_tokens = pair.p.tokens(1)
    pair.p.core.handle(RouterLost(1), pair.now)
    pair.p.heard.sequence_ids.clear()
    for _ in range(300):
        pair.turn()
        if pair.failures() and pair.d.end(1) is None:
            pair.d.heard.handoff_failures.clear()
            pair.to(pair.d, ContinueLocally(1, p_tokens))
    expected = expected_answer(prompt(40), GREEDY)
    tokens = pair.d.tokens(1)
    assert tokens in (expected, expected[len(p_tokens) :])
    pair.assert_nothing_left(pair.d)


def test_a_reused_block_is_fenced_and_what_came_before_is_kept() -> None:
    pair = Pair(blocks_per_step=1, digest=False)
    pair.network.stalled.add(pair.p.peer)
    pair.split(1, prompt(20), GREEDY)
    for _ in range(20):
        pair.turn()
    # The worst moment: the source lets go of a leased block and gives it to other content while the pull is under way.
    block = (
        pair.reader._readings[1].tracks[0].remote[2][0] if 1 in pair.reader._readings else pair.p.engine.pool.names()
    )
    assert isinstance(block, int)
    pair.p.runner.generations[block] += 1
    pair.p.runner.kv[block] = 0
    pair.network.stalled.clear()
    pair.run(until_s=5.0)
    (failure,) = pair.failures()
    assert failure.reason == "fenced"
    continued(pair)
    pair.run()
    assert_exact_after(pair, 20)
    pair.assert_nothing_left()


def test_digests_catch_bytes_that_changed_under_an_unchanged_generation() -> None:
    pair = Pair(digest=True)
    pair.network.stalled.add(pair.p.peer)
    pair.split(1, prompt(20), GREEDY)
    for _ in range(20):
        pair.turn()
    block = pair.reader._readings[1].tracks[0].remote[0][0]
    pair.p.runner.kv[block, 0] += 2
    pair.network.stalled.clear()
    pair.run(until_s=5.0)
    (failure,) = pair.failures()
    assert failure.reason == "digest_mismatch"
    continued(pair)
    pair.run()
    assert_exact_after(pair, 20)


def test_a_stalled_transfer_times_out_and_its_blocks_wait_in_quarantine() -> None:
    pair = Pair(pull_timeout_s=0.5)
    pair.network.stalled.add(pair.p.peer)
    pair.split(1, prompt(20), GREEDY)
    for _ in range(100):
        pair.turn()
    (failure,) = pair.failures()
    assert failure.reason == "timeout"
    continued(pair)
    for _ in range(100):
        pair.turn()
    assert_exact_after(pair, 20)
    assert pair.reader.quarantined_blocks > 0, "bytes may still land"
    assert not pair.d.pool.is_idle()
    pair.network.stalled.clear()
    pair.run()
    pair.assert_nothing_left()


def test_no_room_on_decode_hands_the_request_back() -> None:
    pair = Pair(decode_blocks=12, room_wait_s=0.05, lease_s=0.15)  # the lease is left to another reader, or to expire
    pair.to(pair.d, StartSequence(9, "r9", prompt(30, 9), [], SamplingParams(max_tokens=18)))
    pair.turn()
    pair.split(1, prompt(40), SamplingParams(max_tokens=4))
    for _ in range(60):
        pair.turn()
        if pair.failures():
            break
    (failure,) = pair.failures()
    assert failure.reason == "no_room"
    pair.to(pair.d, CancelSequence(1))
    pair.run()
    pair.assert_nothing_left()


def test_too_many_leased_blocks_fail_the_handoff_not_the_worker() -> None:
    pair = Pair(max_leased_blocks=3)
    pair.split(1, prompt(40), GREEDY)
    pair.run(until_s=2.0)
    end = pair.p.end(1)
    assert end is not None
    assert end.code == Code.RESOURCE_EXHAUSTED
    (failure,) = pair.failures()
    assert failure.reason == "source_failed"
    continued(pair)
    pair.run()
    assert_exact_after(pair, 40)
    pair.assert_nothing_left()


def test_a_reader_that_never_comes_loses_the_lease() -> None:
    pair = Pair(lease_s=2.0)
    pair.cut = True
    pair.split(1, prompt(20), GREEDY)
    for _ in range(100):
        pair.turn()
    assert pair.source.active_leases == 1
    for _ in range(200):
        pair.turn()
    assert pair.source.active_leases == 0
    pair.assert_nothing_left(pair.p)
    pair.to(pair.d, CancelSequence(1))
    pair.run()
    pair.assert_nothing_left()


@pytest.mark.parametrize("turns", range(0, 36, 2))
@pytest.mark.parametrize("who", ["both", "router"])
def test_cancel_at_any_moment_leaves_nothing(turns: int, who: str) -> None:
    pair = Pair()
    pair.split(1, prompt(40), GREEDY)
    for _ in range(turns):
        pair.turn()
    for host in (pair.p, pair.d):
        if who == "both":
            pair.to(host, CancelSequence(1))
        else:
            host.core.handle(RouterLost(1), pair.now)
    pair.run()
    pair.assert_nothing_left()


def test_a_sequence_ends_at_its_deadline_on_its_own() -> None:
    pair = Pair()
    pair.network.stalled.add(pair.p.peer)
    pair.split(1, prompt(20), GREEDY, deadline_s=0.5)
    for _ in range(300):
        pair.turn()
    end = pair.d.end(1)
    assert end is not None
    assert end.code == Code.DEADLINE_EXCEEDED
    pair.network.stalled.clear()
    pair.run()
    pair.assert_nothing_left()


def test_a_draining_worker_finishes_what_it_has_and_refuses_more() -> None:
    pair = Pair()
    pair.split(1, prompt(40), GREEDY)
    pair.turn()
    for host in (pair.p, pair.d):
        host.core.handle(Drain(), pair.now)
    pair.local(2, prompt(5), GREEDY)
    pair.run()
    assert pair.d.tokens(1) == expected_answer(prompt(40), GREEDY)
    end = pair.d.end(2)
    assert end is not None
    assert end.code == Code.UNAVAILABLE
    assert pair.d.heard.draining
    pair.assert_nothing_left()


def test_a_prompt_that_can_never_run_is_refused_on_both_sides() -> None:
    pair = Pair()
    pair.split(1, [*prompt(199), 1, 2], GREEDY)
    pair.run()
    for host in (pair.p, pair.d):
        end = host.end(1)
        assert end is not None
        assert end.code == Code.INVALID_ARGUMENT
        assert "context limit" in end.error
    pair.assert_nothing_left()


def test_router_hears_what_the_caches_hold() -> None:
    pair = Pair()
    pair.local(1, prompt(20), GREEDY)
    pair.run()
    stored = [block for change in pair.d.heard.blocks for block in change.stored]
    assert set(stored) == set(pair.d.pool.hints())
    assert len(stored) == len(pair.d.pool.names())
    numbers = [c.first_sequence_number for c in pair.d.heard.blocks]
    for change, following in zip(pair.d.heard.blocks, numbers[1:], strict=False):
        assert following == change.first_sequence_number + change.num_events


def test_a_draining_worker_hands_back_what_has_not_begun() -> None:
    pair = Pair(decode_blocks=14)
    pair.local(1, prompt(40), GREEDY)
    pair.turn()
    pair.local(2, prompt(40, 2), GREEDY)  # no room beside the first
    pair.turn()
    pair.d.core.handle(Drain(), pair.now)
    pair.turn()
    end = pair.d.end(2)
    assert end is not None
    assert end.code == Code.UNAVAILABLE
    pair.run()
    assert pair.d.tokens(1) == expected_answer(prompt(40), GREEDY)
    pair.assert_nothing_left()


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_another_source_takes_over_and_what_arrived_is_kept(turns: int) -> None:
    """The first source is told to stop midway; the same worker plays the second."""
    pair = Pair()
    pair.split(1, prompt(40), GREEDY)
    for _ in range(turns):
        pair.turn()
    pair.to(pair.p, CancelSequence(1))
    emitted = pair.p.tokens(1)
    assert not pair.adopted()
    start = StartSequence(7, "r7", prompt(40), emitted, GREEDY, serve_handoff_id="h7")
    pair.to(pair.p, start)
    pair.to(pair.d, FollowAnother(1, emitted, HandoffRef("h7", pair.p.peer, "")))
    pair.run()
    (adopted,) = pair.adopted()
    assert adopted.handoff_id == "h7"
    assert emitted + pair.d.tokens(1) == expected_answer(prompt(40), GREEDY)
    pair.assert_nothing_left()


def test_a_lease_kept_for_another_reader_is_released_when_there_is_none() -> None:
    pair = Pair(decode_blocks=12, room_wait_s=0.05, lease_s=1e6)
    pair.to(pair.d, StartSequence(9, "r9", prompt(30, 9), [], SamplingParams(max_tokens=18)))
    pair.turn()
    pair.split(1, prompt(40), SamplingParams(max_tokens=4))
    for _ in range(60):
        pair.turn()
        if pair.failures():
            break
    assert pair.source.active_leases == 1
    continued(pair)
    pair.run()
    assert_exact_after(pair, 40, SamplingParams(max_tokens=4))
    pair.assert_nothing_left()


@pytest.mark.parametrize("end", ["cancel", "router"])
def test_what_was_handed_over_and_not_adopted_ends_with_its_request(end: str) -> None:
    pair = Pair(lease_s=1e6)
    pair.cut = True  # no reader ever comes
    pair.split(1, prompt(20), GREEDY)
    pair.run(until_s=2.0)
    assert pair.source.active_leases == 1
    if end == "cancel":
        pair.to(pair.p, CancelSequence(1))
    else:
        pair.p.core.handle(RouterLost(1), pair.now)
    pair.run(until_s=3.0)
    pair.assert_nothing_left(pair.p)


def test_a_router_that_lost_count_gets_a_snapshot_and_what_follows_it() -> None:
    """As the router's index hears it, over the wire: a gap is noticed, and after the snapshot both agree again."""
    from diptych.v1 import worker_pb2

    from router.placement.cluster import Cluster, Role, WorkerInfo
    from router.placement.view import WorkerKey
    from router.wire import block_events_from_wire
    from worker.messages import ResyncBlocks
    from worker.wire import commands_from_wire, output_to_wire

    pair, cluster = Pair(num_blocks=24), Cluster()
    key = WorkerKey("d", 1)
    cluster.registered(WorkerInfo(key, Role.DECODE, "a", "m", "test", BLOCK, 1, 24, 200, 1000), 0.0, leaving=False)
    cluster.connected(key, 0.0)

    def hear(*, lose: bool = False) -> bool:
        output, complete = pair.d.heard, True
        message = output_to_wire(output, 1, pair.now)
        if output.blocks and not lose:
            events = message.block_events
            complete = cluster.block_events(key, events.first_sequence_number, block_events_from_wire(events))
        output.blocks.clear()
        return complete

    def agree() -> bool:
        return cluster.prefixes._held.get(key, set()) == {hint for hint, _ in pair.d.pool.hints()}

    for i in range(3):
        pair.local(i, prompt(20, i), GREEDY)
        pair.run(pair.now + 1.0)
        assert hear()
        assert agree()
    pair.local(3, prompt(40, 3), GREEDY)  # evicts
    pair.run(pair.now + 1.0)
    hear(lose=True)
    pair.local(4, prompt(24, 4), GREEDY)
    pair.run(pair.now + 1.0)
    assert not hear(), "a gap"
    assert not agree()
    (resync,) = commands_from_wire(worker_pb2.ConnectRequest(resync_blocks=True))
    assert resync == ResyncBlocks()
    pair.local(5, prompt(30, 5), GREEDY)
    pair.to(pair.d, resync)
    pair.run(pair.now + 1.0)
    assert hear(), "a snapshot, and in the same message what came after it"
    assert agree()
    pair.local(6, prompt(44, 6), GREEDY)
    pair.run(pair.now + 1.0)
    assert hear()
    assert agree()
    cluster.prefixes.check()
