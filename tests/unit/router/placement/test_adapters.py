"""Who has which adapter, as a router sees it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from router.admission import ServedModel
from router.placement.adapter_words import AdaptersSaid, AdapterWord, said_at_start
from router.placement.adapters import Adapters
from router.placement.cluster import Cluster, Role, WorkerInfo
from router.placement.policy import PolicyParams, RequestFacts, Route, decide
from router.placement.revisions import Revisions
from router.placement.view import WorkerKey
from router.planner import Planner
from router.request import Request, Sampling
from router.retry import RetryBudget
from worker.messages import Load

SQL, NEW_SQL, POET = "a" * 32, "b" * 32, "c" * 32


def worker(name: str, role: Role, **adapters: str) -> WorkerInfo:
    info = WorkerInfo(WorkerKey(name, 1), role, "host:1", "m", "kv", 32, 64, 100, 8192, 1000)
    return replace(info, adapters=said_at_start(*adapters.items()))


class Side:
    def __init__(self, *workers: WorkerInfo) -> None:
        self.cluster = Cluster()
        self.adapters = Adapters(self.cluster, ("m", "alias"))
        for info in workers:
            self.join(info)

    def join(self, info: WorkerInfo) -> None:
        self.cluster.registered(info, 0.0, leaving=False)
        self.cluster.connected(info.key, 0.0)

    def lacking(self, digest: str) -> set[str]:
        return {key.worker_id for key in self.adapters.lacking(digest)}


def test_names_and_who_lacks_them() -> None:
    side = Side(worker("p", Role.PREFILL, sql=SQL), worker("d", Role.DECODE, sql=SQL, poet=POET))
    assert side.adapters.digests() == {"poet": POET, "sql": SQL}
    assert side.lacking(SQL) == set()
    assert side.lacking(POET) == {"p"}
    assert side.lacking("") == set()
    assert side.lacking(NEW_SQL) == {"p", "d"}


def test_while_one_is_replaced_most_workers_decide() -> None:
    side = Side(*(worker(f"d{i}", Role.DECODE, sql=SQL) for i in range(2)))
    side.join(worker("d2", Role.DECODE, sql=NEW_SQL))
    assert side.adapters.digests() == {"sql": SQL}
    assert side.adapters.older() == {"sql": {NEW_SQL}}
    side.join(worker("d3", Role.DECODE, sql=NEW_SQL))
    side.join(worker("d4", Role.DECODE, sql=NEW_SQL))
    assert side.adapters.digests() == {"sql": NEW_SQL}
    assert side.adapters.older() == {"sql": {SQL}}
    assert side.lacking(NEW_SQL) == {"d0", "d1"}, "who began on the old one goes on there"


def test_a_name_stays_known_while_its_workers_are_lost_and_the_models_own_is_never_one() -> None:
    side = Side(worker("d", Role.DECODE, sql=SQL, alias=POET))
    assert side.adapters.digests() == {"sql": SQL}
    assert side.adapters.older() == {}
    side.cluster.lost(WorkerKey("d", 1))
    side.join(worker("d2", Role.DECODE, sql=NEW_SQL))
    assert side.adapters.digests() == {"sql": NEW_SQL}
    assert side.adapters.older() == {"sql": {SQL}}, "the lost one may come back"
    for name in ("d", "d2"):
        side.cluster.forget(WorkerKey(name, 1))
    assert side.adapters.digests() == {"sql": NEW_SQL}
    assert side.adapters.older() == {"sql": {SQL}}


def test_both_legs_and_every_recovery_are_placed_on_workers_that_have_it() -> None:
    side = Side(worker("p", Role.PREFILL), worker("p2", Role.PREFILL, sql=SQL), worker("d", Role.DECODE, sql=SQL))
    side.join(worker("d2", Role.DECODE))
    asked: list[RequestFacts] = []

    def note(facts: RequestFacts) -> Route:
        asked.append(facts)
        return Route(WorkerKey("d", 1), None, "test", {})

    rng = random.Random(0)
    revisions = Revisions(side.cluster, "m", rng, "refuse", side.adapters)
    planner = Planner(side.cluster, PolicyParams(), RetryBudget(1.0, 1), note, revisions, rng, lambda: 0.0, "")
    plain = Request("r", [1, 2, 3], Sampling(8), 0.0, 60.0)
    for request in (plain, replace(plain, adapter=SQL)):
        planner.place(request, 0, frozenset())
        planner.first(request, RequestFacts(3, 8))
    assert [{key.worker_id for key in facts.exclude} for facts in asked] == [set(), set(), {"p", "d2"}, {"p", "d2"}]
    assert planner.another_reader(replace(plain, adapter=SQL), WorkerKey("p2", 1), frozenset()) == WorkerKey("d", 1)


def test_where_it_is_loaded() -> None:
    side = Side(*(worker(f"d{i}", Role.DECODE, sql=SQL, poet=POET) for i in range(3)))
    assert side.adapters.loaded_on(SQL) == ()
    side.cluster.reported(WorkerKey("d1", 1), Load(loaded_adapters=(SQL,)), 1.0)
    assert side.adapters.loaded_on(SQL) == (WorkerKey("d1", 1),)
    assert side.adapters.loaded_on(POET) == ()


def live(name: str, role: Role, *words: AdapterWord, kept: tuple[tuple[str, str], ...] = ()) -> WorkerInfo:
    return replace(worker(name, role), adapters=AdaptersSaid(words, kept, changes=1, takes_more=True))


def test_the_latest_command_decides_however_few_have_what_it_named() -> None:
    old, new = AdapterWord("sql", SQL, "/a", 5), AdapterWord("sql", NEW_SQL, "/b", 9)
    side = Side(*(live(f"d{i}", Role.DECODE, old) for i in range(3)), live("p", Role.PREFILL, new))
    assert side.adapters.digests() == {"sql": NEW_SQL}
    assert side.lacking(NEW_SQL) == {"d0", "d1", "d2"}, (
        "refused until one has it: never answered from what was replaced"
    )
    assert side.adapters.words()["sql"] == new
    side.cluster.said_adapters(WorkerKey("d0", 1), AdaptersSaid((new,), (("sql", SQL),), changes=2))
    assert side.adapters.digests() == {"sql": NEW_SQL}, "one of three, and the latest"
    assert side.adapters.older() == {"sql": {SQL}}
    assert side.lacking(SQL) == {"p"}, "d0 keeps it for answers that began on it"
    assert side.lacking(NEW_SQL) == {"d1", "d2"}


def test_an_unloaded_name_is_gone_at_once_whoever_still_has_it() -> None:
    side = Side(worker("d", Role.DECODE, sql=SQL), live("d2", Role.DECODE, AdapterWord("poet", POET, "/p", 3)))
    side.adapters.command(AdapterWord("sql", "", "", 7))
    assert side.adapters.digests() == {"poet": POET}
    assert side.lacking(SQL) == {"d2"}, "answers that began on it go on"
    for name in ("d", "d2"):
        side.cluster.forget(WorkerKey(name, 1))
    side.adapters.command(AdapterWord("poet", "", "", 8))
    assert side.adapters.digests() == {}
    side.join(worker("d3", Role.DECODE, sql=SQL))
    assert side.adapters.digests() == {}, "settings have no stamp"
    side.join(live("d4", Role.DECODE, AdapterWord("sql", SQL, "/a", 8)))
    assert side.adapters.digests() == {"sql": SQL}


def test_where_it_has_to_be_loaded_first_a_request_costs_more() -> None:
    side = Side(*(worker(f"d{i}", Role.DECODE, sql=SQL) for i in range(2)))
    for i, loaded in enumerate(((), (SQL,))):
        load = Load(
            total_blocks=100, free_blocks=100, prefill_tokens_per_s=1e4, loaded_adapters=loaded, adapter_load_ms=40
        )
        side.cluster.reported(WorkerKey(f"d{i}", 1), load, 1.0)
    load_ms = side.adapters.load_ms(SQL)
    assert load_ms is not None
    assert [load_ms(WorkerKey(f"d{i}", 1)) for i in range(3)] == [40, 0, 0]
    assert side.adapters.load_ms("") is None
    for seed in range(8):
        facts = RequestFacts(100, 8, load_ms=load_ms)
        route = decide(facts, side.cluster.view(), PolicyParams(), 1.0, random.Random(seed))
        assert isinstance(route, Route)
        assert route.decode == WorkerKey("d1", 1)
        assert route.estimates["adapter_load_ms"] == 0
        costs = sorted(other.cost_ms for other in route.alternatives)
        assert costs[0] == pytest.approx(route.cost_ms + 40)


def test_a_key_is_asked_for_the_adapters_name_and_not_for_the_models() -> None:
    model = ServedModel("m", 100, 64, frozenset(), aliases=("m", "alias"), adapters={"sql": SQL})
    assert model.names == ("m", "alias", "sql")
    assert model.called("sql") == ("sql",)
    assert model.called("alias") == model.called("") == ("m", "alias")


def test_what_an_answer_goes_on_with_names_its_adapter() -> None:
    request = Request("r", [1], Sampling(8), 0.0, 60.0, revision="w/bfloat16")
    assert request.answered_by == "w/bfloat16"
    assert replace(request, adapter=SQL).answered_by == f"w/bfloat16#{SQL}"
