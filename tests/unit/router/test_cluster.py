from __future__ import annotations

import random
from types import SimpleNamespace

from router.cluster import Cluster, Promise, Role, WorkerInfo, WorkerState
from router.policy import WorkerKey
from router.prefix_index import PrefixIndex


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
    assert cluster.view().decode == []


def test_promises_count_until_reports_show_them() -> None:
    cluster = Cluster()
    key = ready(cluster, info("d"))
    cluster.dispatched(key, 7, Promise(prefill_tokens=320, blocks=10))
    (view,) = cluster.view().decode
    assert (view.backlog_tokens, view.free_blocks) == (320, 90)
    cluster.reported(key, load(free=90, backlog=320), 1.0)
    (view,) = cluster.view().decode
    assert view.backlog_tokens == 320, "the report shows what was promised: not counted twice"
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


def test_losing_a_worker_returns_its_legs_and_keeps_no_promise() -> None:
    cluster = Cluster()
    key = ready(cluster, info("d"))
    cluster.dispatched(key, 7, Promise(1, 1))
    cluster.dispatched(key, 8, Promise(1, 1))
    assert sorted(cluster.lost(key)) == [7, 8]
    cluster.check_empty()


def test_a_gap_in_block_events_forgets_what_was_known() -> None:
    cluster = Cluster()
    key = ready(cluster, info("d"))
    cluster.block_events(key, 10, [("cleared", []), ("stored", [b"a", b"b"])])
    assert cluster.prefixes.matched_blocks([b"a", b"b"]) == {key: 2}
    cluster.block_events(key, 12, [("removed", [b"b"])])
    assert cluster.prefixes.matched_blocks([b"a", b"b"]) == {key: 1}
    cluster.block_events(key, 14, [("stored", [b"c"])])
    assert cluster.prefixes.matched_blocks([b"a"]) == {}
    cluster.lost(key)
    assert len(cluster.prefixes) == 0


def test_the_index_agrees_with_a_plain_model() -> None:
    rng = random.Random(5)
    index: PrefixIndex[str] = PrefixIndex()
    model: dict[str, set[bytes]] = {}
    chain = [bytes([i]) for i in range(12)]
    for _ in range(3000):
        worker = f"w{rng.randrange(9)}"
        names = rng.sample(chain, rng.randint(1, 4))
        match rng.randrange(10):
            case 0:
                index.gone(worker)
                model.pop(worker, None)
            case 1:
                index.cleared(worker)
                if worker in model:
                    model[worker] = set()
            case 2 | 3 | 4:
                index.removed(worker, names)
                model.get(worker, set()).difference_update(names)
            case _:
                index.stored(worker, names)
                model.setdefault(worker, set()).update(names)
        expected = {}
        for name, held in model.items():
            count = next((i for i, n in enumerate(chain) if n not in held), len(chain))
            if count:
                expected[name] = count
        assert index.matched_blocks(chain) == expected
    assert index.matched_blocks([]) == {}
