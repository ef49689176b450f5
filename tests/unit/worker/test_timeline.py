"""What a sequence's first token waited for on a worker."""

from __future__ import annotations

import pytest

from worker.timeline import Chunk, Timeline


def test_the_parts_reach_from_received_to_sampled() -> None:
    t = Timeline(received=1.0)
    t.step(1.2, 1.5, 100)
    t.step(1.6, 1.9, 50)  # in between, a step of others
    first = t.first_step(7, 1.9)
    assert first.sequence_id == 7
    assert [first.held_s, first.queue_s, first.prefill_s, first.prefill_wait_s] == pytest.approx([0.0, 0.2, 0.6, 0.1])
    assert sum([first.held_s, first.queue_s, first.prefill_s, first.prefill_wait_s]) == pytest.approx(0.9)
    phases = t.phases(handed_over=True, ended=1.9)
    assert [p.name for p in phases] == ["queue", "prefill"]
    assert phases[1].chunks == (Chunk(1.5, 100), Chunk(1.9, 50))


def test_waiting_for_kv_that_did_not_come_is_told_apart_from_the_queue() -> None:
    t = Timeline(received=0.0)
    t.announced, t.runnable = 0.1, 0.5
    t.step(0.7, 0.8, 10)
    first = t.first_step(1, 0.8)
    assert [first.held_s, first.queue_s, first.prefill_s] == pytest.approx([0.5, 0.2, 0.1])
    assert [p.name for p in t.phases(False, 1.0)] == ["transfer", "queue", "prefill", "decode"]


def test_the_phases_of_a_reader_and_of_one_that_was_cancelled_in_the_queue() -> None:
    t = Timeline(received=0.0)
    t.announced, t.final_at, t.adopted, t.runnable = 0.1, 0.3, 0.4, 0.4
    t.step(0.4, 0.5, 1)
    t.first_step(1, 0.5)
    assert [(p.name, p.start, p.end) for p in t.phases(False, 2.0)] == [
        ("transfer", 0.1, 0.4),
        ("adopt", 0.3, 0.4),
        ("decode", 0.4, 2.0),
    ]
    assert [p.name for p in Timeline(received=0.0).phases(False, 1.0)] == ["queue"]
