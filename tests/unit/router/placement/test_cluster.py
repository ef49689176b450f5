from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from router.placement.cluster import Cluster, Promise, Role, WorkerInfo, WorkerState
from router.placement.policy import WorkerKey


def info(name: str, epoch: int = 1, role: Role = Role.DECODE) -> WorkerInfo:
    return WorkerInfo(WorkerKey(name, epoch), role, "host:1", "m", "kv", 32, 1024, 100, 8192, 1000)


def ready(cluster: Cluster, worker: WorkerInfo) -> WorkerKey:
    cluster.registered(worker, 0.0, leaving=False)
    cluster.connected(worker.key, 0.0)
    return worker.key


def load(free: int = 100, backlog: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        free_blocks=free,
        prefill_backlog_tokens=backlog,
        running_sequences=0,
        step_ms=0.0,
        prefill_tokens_per_s=0.0,
        pull_bytes_per_s=0.0,
        step_per_token_ms=0.0,
        step_cost_error=0.0,
        waiting_blocks=0,
        last_sequence_id=0,
        chunk_tokens=0,
        decode_step_ms=0.0,
    )


def test_a_worker_counts_only_while_its_stream_is_open() -> None:
    cluster = Cluster()
    key = info("d").key
    cluster.registered(info("d"), 0.0, leaving=False)
    assert cluster.ready(Role.DECODE) == []
    cluster.connected(key, 1.0)
    assert [e.key for e in cluster.ready(Role.DECODE)] == [key]
    cluster.lost(key)
    assert cluster.ready(Role.DECODE) == []
    cluster.connected(key, 2.0)
    assert len(cluster.ready(Role.DECODE)) == 1


def test_a_later_incarnation_replaces_the_earlier() -> None:
    cluster = Cluster()
    ready(cluster, info("d", 1))
    _, older = cluster.registered(info("d", 2), 1.0, leaving=False)
    assert [e.key.epoch for e in older] == [1]
    assert cluster.later_than(WorkerKey("d", 1)) is not None


def test_a_leaving_worker_gets_no_new_work() -> None:
    cluster = Cluster()
    key = ready(cluster, info("d"))
    cluster.registered(info("d"), 1.0, leaving=True)
    assert cluster.workers[key].state is WorkerState.DRAINING
    assert list(cluster.view().decode) == []


def test_promises_count_until_reports_show_them() -> None:
    cluster = Cluster()
    key = ready(cluster, info("d"))
    cluster.dispatched(key, 7, Promise(prefill_tokens=320, blocks=10))
    (view,) = cluster.view().decode
    assert (view.wait_ms(0.0), view.free_blocks) == (320.0, 90)
    cluster.reported(key, load(free=100, backlog=100), 1.0)
    (view,) = cluster.view().decode
    assert (view.wait_ms(1.0), view.free_blocks) == (420.0, 90), "a report from before it came"
    seen = load(free=90, backlog=320)
    seen.last_sequence_id = 7
    cluster.reported(key, seen, 2.0)
    (view,) = cluster.view().decode
    assert (view.wait_ms(2.0), view.free_blocks) == (320.0, 90), "the report shows what was promised: not twice"
    assert view.wait_ms(2.2) == pytest.approx(120.0), "computed meanwhile"
    cluster.computed(key, 7)
    cluster.ended(key, 7)
    cluster.check_empty()


def test_workers_of_one_kind_share_their_measured_speed() -> None:
    cluster = Cluster()
    d, p = ready(cluster, info("d")), ready(cluster, info("p", role=Role.PREFILL))
    for key, rate in ((d, 800.0), (p, 1200.0)):
        one = load()
        one.prefill_tokens_per_s = rate
        cluster.reported(key, one, 1.0)
    view = cluster.view()
    assert [w.prefill_tokens_per_s for w in (*view.decode, *view.prefill)] == [1000.0, 1000.0]


@pytest.mark.parametrize(
    "unlike",
    [
        {"device": "cuda:0 (NVIDIA H200) bfloat16"},
        {"attention_backend": "model's own layers, triton, 2 ranks"},
        {"group": "h200"},
    ],
)
def test_workers_of_one_pool_that_differ_are_known_by_what_each_has_measured(unlike: dict[str, Any]) -> None:
    cluster = Cluster()
    rates = {"fast": 4000.0, "slow": 1000.0, "slow too": 800.0}
    for name, rate in rates.items():
        one = load()
        one.prefill_tokens_per_s = rate
        cluster.reported(ready(cluster, replace(info(name), **(unlike if name == "fast" else {}))), one, 1.0)
    found = {w.key.worker_id: w.prefill_tokens_per_s for w in cluster.view().decode}
    assert found == {"fast": 4000.0, "slow": 900.0, "slow too": 900.0}


def test_losing_a_worker_returns_its_legs_and_keeps_no_promise() -> None:
    cluster = Cluster()
    key = ready(cluster, info("d"))
    cluster.dispatched(key, 7, Promise(1, 1))
    cluster.dispatched(key, 8, Promise(1, 1))
    assert sorted(cluster.lost(key)) == [7, 8]
    cluster.check_empty()


def test_a_gap_in_block_events_forgets_what_was_known_and_asks_for_a_snapshot() -> None:
    cluster = Cluster()
    key = ready(cluster, info("d"))
    assert cluster.block_events(key, 10, [("cleared", None), ("stored", [(0, [1, 2])])])
    assert cluster.prefixes.matched_blocks([1, 2]) == {key: 2}
    assert cluster.block_events(key, 12, [("removed", [2])])
    assert cluster.prefixes.matched_blocks([1, 2]) == {key: 1}
    assert not cluster.block_events(key, 14, [("stored", [(0, [3])])])
    assert cluster.prefixes.matched_blocks([1]) == {}
    assert cluster.block_events(key, 3, [("cleared", None), ("stored", [(0, [1])])]), "a snapshot, under any number"
    assert cluster.block_events(key, 5, [("stored", [(1, [2])])]), "and what follows it"
    assert cluster.prefixes.matched_blocks([1, 2]) == {key: 2}
    cluster.lost(key)
    assert len(cluster.prefixes) == 0


def test_transfers_queue_at_both_ends_until_they_have_arrived() -> None:
    cluster = Cluster()
    d, p = ready(cluster, info("d")), ready(cluster, info("p", role=Role.PREFILL))
    cluster.dispatched(d, 7, Promise(0, 10, sequences=1, incoming_bytes=4096, source=p))
    cluster.dispatched(p, 8, Promise(320, 10))
    (decode,), (prefill,) = cluster.view().decode, cluster.view().prefill
    assert (decode.queued_in_bytes, prefill.queued_out_bytes) == (4096, 4096)
    assert (decode.arriving_sequences, decode.running_sequences) == (1, 1)
    one = load()
    one.last_sequence_id = 8
    cluster.reported(d, one, 1.0)
    (decode,) = cluster.view().decode
    assert (decode.queued_in_bytes, decode.arriving_sequences) == (4096, 0), "the report has the sequence, not its KV"
    cluster.computed(d, 7)
    (decode,), (prefill,) = cluster.view().decode, cluster.view().prefill
    assert (decode.queued_in_bytes, prefill.queued_out_bytes) == (0, 0)
    for key, leg in ((d, 7), (p, 8)):
        cluster.ended(key, leg)
    cluster.check_empty()


@pytest.mark.parametrize("loses", ["reader", "source"])
def test_nothing_stays_queued_when_either_end_is_lost(loses: str) -> None:
    cluster = Cluster()
    d, p = ready(cluster, info("d")), ready(cluster, info("p", role=Role.PREFILL))
    cluster.dispatched(d, 7, Promise(0, 10, incoming_bytes=4096, source=p))
    cluster.lost(d if loses == "reader" else p)
    cluster.ended(d, 7)
    cluster.check_empty()


def test_the_view_is_what_the_workers_are_after_every_event() -> None:
    """Kept by single events, it equals one that is built anew."""
    rng = random.Random(7)
    cluster = Cluster()
    infos = [info(f"w{i}", role=rng.choice(list(Role))) for i in range(6)]
    for step in range(2000):
        one = rng.choice(infos)
        known = cluster.workers.get(one.key)
        match rng.randrange(9):
            case 0:
                cluster.registered(one, float(step), leaving=False)
                cluster.connected(one.key, float(step))
            case 1:
                cluster.lost(one.key)
            case 2:
                cluster.draining(one.key)
            case 3:
                cluster.forget(one.key)
            case 4 if known is not None:
                report = load(rng.randrange(100), rng.randrange(1000))
                report.prefill_tokens_per_s = rng.choice((0.0, 500.0, 1000.0))
                report.last_sequence_id = step - rng.randrange(50)
                broken = frozenset(rng.sample([i.key for i in infos], rng.randrange(3)))
                cluster.reported(one.key, report, float(step), broken)
            case 5 if known is not None:
                other = rng.choice(infos).key
                cluster.dispatched(one.key, step, Promise(10, 2, 1, rng.choice((0, 64)), other))
            case 6 if known is not None:
                cluster.said_role(one.key, rng.choice(list(Role)), known.role_changes + rng.choice((0, 1)))
            case _:
                if known is not None and known.legs:
                    cluster.ended(one.key, rng.choice(sorted(known.legs)))
        view = cluster.view()
        for role, pool in ((Role.DECODE, view.decode), (Role.PREFILL, view.prefill), (Role.STANDBY, view.standby)):
            assert {w.key for w in pool} == {e.key for e in cluster.ready(role)}
            for w in pool:
                entry = cluster.workers[w.key]
                assert w.promised_tokens == sum(p.prefill_tokens for p in entry.promises.values())
                assert w.queued_in_bytes == sum(b for b, _ in entry.transfers.values())
                assert w.arriving_sequences == len(entry.promises)
                if entry.load is not None:
                    assert w.backlog_tokens == entry.load.prefill_backlog_tokens
                    rates = cluster._prefill_rates[entry.kind]
                    assert w.prefill_tokens_per_s == rates.mean
        assert view.broken_paths == {(s, e.key) for e in cluster.workers.values() for s in e.broken_sources}
    for leg_owner in list(cluster.workers.values()):
        cluster.lost(leg_owner.key)
    cluster.check_empty()


def test_a_worker_changes_its_role_and_nothing_else() -> None:
    cluster = Cluster()
    key, other = ready(cluster, info("w")), ready(cluster, info("other"))
    view = cluster.view()
    cluster.reported(key, load(free=70), 1.0)
    cluster.block_events(key, 1, [("stored", [(0, [11, 12])])])
    cluster.dispatched(key, 5, Promise(0, 3, 1, 64, other))
    for _ in range(20):
        cluster.learned_ttft(key, 1000.0, 2000.0, 1.0)
    cluster.reported(key, load(free=70), 1.0)
    before = view.decode.find(key)
    assert cluster.said_role(key, Role.PREFILL, 1)
    assert view.decode.find(key) is None
    assert view.prefill.find(key) == before
    assert cluster.prefixes.match([11, 12], 32) == {key: 64}
    assert cluster.workers[key].legs == {5}
    assert cluster.said_role(key, Role.STANDBY, 2)
    assert (len(view.prefill), view.find(key)) == (0, before), "it still lends what it holds"
    assert cluster.ready(Role.STANDBY) == [cluster.workers[key]]
    assert cluster.said_role(key, Role.DECODE, 3)
    assert view.decode.find(key) == before
    assert cluster.switches == {("decode", "prefill"): 1, ("prefill", "standby"): 1, ("standby", "decode"): 1}
    cluster.ended(key, 5)
    cluster.check_empty()


def test_of_two_words_on_a_role_the_later_one_holds() -> None:
    """A heartbeat that was written before the switch may arrive after the stream's word of it."""
    cluster = Cluster()
    key = ready(cluster, info("w"))
    assert cluster.said_role(key, Role.PREFILL, 1)
    assert not cluster.said_role(key, Role.DECODE, 0)
    assert not cluster.said_role(key, Role.PREFILL, 1)
    assert cluster.workers[key].role is Role.PREFILL
    assert cluster.said_role(key, Role.DECODE, 4), "changes in between were another router's"
    assert not cluster.said_role(key, Role.PREFILL, 3)
    cluster.lost(key)
    cluster.connected(key, 9.0)
    assert [e.key for e in cluster.ready(Role.DECODE)] == [key], "a stream that breaks changes no role"
    assert not cluster.said_role(WorkerKey("nobody", 1), Role.DECODE, 9)


def test_a_worker_begins_anew_with_the_role_that_it_registers_with() -> None:
    cluster = Cluster()
    key = ready(cluster, info("w"))
    cluster.said_role(key, Role.STANDBY, 7)
    again = ready(cluster, info("w", epoch=2))
    assert [e.key for e in cluster.ready(Role.DECODE)] == [again]


def test_a_prompt_that_waited_for_others_teaches_nothing_about_the_worker() -> None:
    cluster = Cluster()
    key = ready(cluster, info("d"))
    correction = cluster.workers[key].learned.ttft
    before = correction.value(1.0)
    for _ in range(20):
        cluster.learned_ttft(key, 1000.0, 9000.0, 1.0, backlog_ms=400.0)
    assert correction.value(1.0) == before
    for _ in range(20):
        cluster.learned_ttft(key, 1000.0, 2000.0, 1.0, backlog_ms=100.0)
    assert correction.value(1.0)(1000.0) > 1500.0
