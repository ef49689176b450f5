"""Old and new workers side by side: who goes on with whose requests, and where new ones go."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from kv_transfer.prefix_hint import hint_root, prefix_hints
from router.errors import Code, RequestRefused
from router.placement.cluster import Cluster, Role, WorkerInfo
from router.placement.policy import Placement, PolicyParams, RequestFacts, Route, WorkerKey, decide
from router.placement.revisions import Revisions, revision_of
from router.planner import Planner
from router.request import Beams, Request, Sampling
from router.retry import RetryBudget

OLD, NEW = "a" * 32, "b" * 32


def worker(name: str, role: Role, weights: str = OLD, layout: str = "kv32", block_tokens: int = 32) -> WorkerInfo:
    info = WorkerInfo(WorkerKey(name, 1), role, "host:1", "m", f"{layout}-{weights}", block_tokens, 64, 100, 8192, 1000)
    return replace(info, model_identity=weights, dtype="bfloat16")


class Side:
    """Workers of one cluster, as a router sees them."""

    def __init__(self, *workers: WorkerInfo) -> None:
        self.cluster = Cluster()
        self.revisions = Revisions(self.cluster, "m", random.Random(0), "beside")
        for info in workers:
            self.join(info)

    def join(self, info: WorkerInfo) -> None:
        self.revisions.check(info, any_live=True)
        self.cluster.registered(info, 0.0, leaving=False)
        self.cluster.connected(info.key, 0.0)

    def leave(self, name: str) -> None:
        self.cluster.draining(WorkerKey(name, 1))

    def keys(self, revision: str) -> set[str]:
        return {key.worker_id for key in self.revisions.others(revision)}


def test_one_revision_excludes_nobody_and_is_named() -> None:
    side = Side(worker("p", Role.PREFILL), worker("d", Role.DECODE))
    assert side.revisions.in_turn() == (f"{OLD}/bfloat16",)
    assert side.keys(f"{OLD}/bfloat16") == set()
    assert Side().revisions.in_turn() == ("",), "nobody is there yet: the policy says so"


def test_new_weights_get_requests_from_their_first_complete_set_on_by_the_number_of_their_workers() -> None:
    side = Side(worker("p", Role.PREFILL), *(worker(f"d{i}", Role.DECODE) for i in range(3)))
    old, new = f"{OLD}/bfloat16", f"{NEW}/bfloat16"
    side.join(worker("d3", Role.DECODE, NEW))
    assert side.revisions.in_turn() == (old,), "the new one cannot split yet, as the old one can"
    side.join(worker("p2", Role.PREFILL, NEW))
    first = Counter(side.revisions.in_turn()[0] for _ in range(2000))
    assert first.keys() == {old, new}
    assert 0.2 < first[new] / 2000 < 0.3, "one decode worker of four"
    assert sorted(side.revisions.in_turn()) == [old, new], "who has no time for it is followed by the other"
    assert side.keys(old) == {"p2", "d3"}
    assert side.keys(new) == {"p", "d0", "d1", "d2"}
    side.leave("p")
    assert side.revisions.in_turn() == (new,), "the old pair is gone"
    assert side.keys(old) == {"p2", "d3"}, "what began there ends there"


def test_a_request_whose_revision_is_gone_is_given_to_nobody_else() -> None:
    side = Side(worker("d0", Role.DECODE), worker("d1", Role.DECODE, NEW))
    side.leave("d0")
    assert side.keys(f"{OLD}/bfloat16") == {"d1"}
    with pytest.raises(
        RequestRefused, match=r"began on a revision of the model .aaaaaaaa. of which no worker"
    ) as error:
        side.revisions.in_turn(f"{OLD}/bfloat16")
    assert (error.value.failure.code, error.value.failure.retry_after_ms > 0) == (Code.UNAVAILABLE, True)
    assert side.revisions.in_turn(f"{NEW}/bfloat16") == (f"{NEW}/bfloat16",)


def test_another_type_is_another_revision_and_another_block_size_is_not() -> None:
    one = worker("d", Role.DECODE)
    assert revision_of(one) != revision_of(replace(one, dtype="float32"))
    assert revision_of(one) == revision_of(worker("d", Role.DECODE, layout="kv16", block_tokens=16))
    assert revision_of(replace(one, model_identity="")) == "", "it does not say"


def test_pairs_of_two_layouts_go_on_among_themselves_and_each_cache_is_found() -> None:
    old, new = ("kv32", 32), ("kv16", 16)
    roles = (Role.PREFILL, Role.DECODE)
    side = Side(*(worker(f"{r.value}-{name}", r, OLD, name, b) for r in roles for name, b in (old, new)))
    prompt = list(range(100, 164))
    for layout, block_tokens, blocks in (("kv32", 32, 1), ("kv16", 16, 3)):
        hints = prefix_hints(prompt, block_tokens, hint_root(f"{layout}-{OLD}", block_tokens, ""))
        side.cluster.prefixes.stored(WorkerKey(f"decode-{layout}", 1), hints.tolist()[:blocks], 0)
    cached = side.revisions.cached_tokens(prompt, "")
    assert cached == {WorkerKey("decode-kv32", 1): 32, WorkerKey("decode-kv16", 1): 48}
    rng = random.Random(1)
    for _ in range(50):
        facts = RequestFacts(rng.randrange(64, 3000), 10, cached_tokens=cached if rng.random() < 0.5 else {})
        route = decide(facts, side.cluster.view(), PolicyParams(), 0.0, rng)
        assert isinstance(route, Route)
        if route.prefill is not None:
            assert route.prefill.worker_id.split("-")[1] == route.decode.worker_id.split("-")[1]
    assert side.keys(side.revisions.in_turn()[0]) == set(), "either may go on with a request of the other"


def test_a_worker_that_would_ignore_what_a_request_asks_for_is_not_asked() -> None:
    side = Side(worker("p", Role.PREFILL), worker("d", Role.DECODE), worker("d2", Role.DECODE))
    plain = Request("r", [1, 2, 3], Sampling(8), 0.0, 60.0, revision=f"{OLD}/bfloat16")
    masked = replace(plain, sampling=Sampling(8, bad_words=((7,),)))
    assert side.revisions.unable(masks_tokens=True) == set()
    side.join(replace(worker("d3", Role.DECODE), masks_tokens=False))
    asked: list[RequestFacts] = []

    def note(facts: RequestFacts) -> Route:
        asked.append(facts)
        return Route(WorkerKey("d", 1), None, "test", {})

    planner = Planner(
        side.cluster, PolicyParams(), RetryBudget(1.0, 1), note, side.revisions, random.Random(0), lambda: 0.0, ""
    )
    for request in (plain, masked):
        planner.place(request, 0, frozenset({WorkerKey("d2", 1)}))
        planner.first(request, RequestFacts(3, 8))
    names = [{key.worker_id for key in facts.exclude} for facts in asked]
    assert names == [{"d2"}, set(), {"d2", "d3"}, {"d3"}]
    side.join(replace(worker("d4", Role.DECODE), scores_prompts=False))
    asked.clear()
    planner.first(masked, RequestFacts(3, 8))
    planner.first(replace(masked, sampling=replace(masked.sampling, prompt_logprobs=0)), RequestFacts(3, 8))
    planner.place(replace(plain, sampling=Sampling(0, prompt_logprobs=0)), 0, frozenset())
    assert [{key.worker_id for key in facts.exclude} for facts in asked] == [{"d3"}, {"d3", "d4"}, {"d4"}]
    assert [facts.placement for facts in asked] == [Placement.AUTO, Placement.AUTO, Placement.LOCAL]
    side.join(replace(worker("d5", Role.DECODE), searches_beams=False))
    side.join(replace(worker("p5", Role.PREFILL), searches_beams=False))
    asked.clear()
    planner.place(replace(plain, sampling=Sampling(8, beams=Beams(4, 1))), 0, frozenset())
    assert [{key.worker_id for key in facts.exclude} for facts in asked] == [{"d5"}], "any prefill worker will do"
    assert asked[0].max_tokens == 32, "room for all beams"
    searched = replace(plain, sampling=Sampling(8, beams=Beams(4, 1)))
    for length, placed in ((8190, Placement.SPLIT), (8191, Placement.LOCAL)):
        longer = replace(searched, prompt=[5] * length)
        assert planner.placement(longer, Placement.SPLIT) is placed, "of 8192: the token that is sampled would end it"
    assert planner.placement(replace(plain, prompt=[5] * 8191), Placement.SPLIT) is Placement.SPLIT


def test_what_is_cached_of_a_prompt_that_is_scored_is_of_no_use() -> None:
    side = Side(worker("d", Role.DECODE))
    prompt = list(range(100, 164))
    hints = prefix_hints(prompt, 32, hint_root(worker("d", Role.DECODE).layout_fingerprint, 32, ""))
    side.cluster.prefixes.stored(WorkerKey("d", 1), hints.tolist())
    planner = Planner(
        side.cluster, PolicyParams(), RetryBudget(1.0, 1), lambda facts: Route(WorkerKey("d", 1), None, "test", {}),
        side.revisions, random.Random(0), lambda: 0.0, "",
    )  # fmt: skip
    plain = Request("r", prompt, Sampling(8), 0.0, 60.0)
    scored = replace(plain, sampling=Sampling(8, prompt_logprobs=1))
    assert planner.cached_tokens(plain, 0) == planner.cached_tokens(scored, 1) == {WorkerKey("d", 1): 64}
    assert planner.cached_tokens(scored, 0) == {}, "once there is a token, they are there"


def test_a_long_prompt_is_looked_for_among_blocks_of_the_long_table() -> None:
    """Where a model has two rotary tables: what a short prompt left that begins alike is of no use to it."""
    info = replace(worker("d", Role.DECODE), original_context_tokens=96)
    side, prompt = Side(info), list(range(160))

    def store(count: int, *, long: bool) -> None:
        hints = prefix_hints(prompt[:count], 32, hint_root(info.layout_fingerprint, 32, "", long=long))
        side.cluster.prefixes.stored(info.key, hints.tolist())

    def found(count: int) -> int:
        return side.revisions.cached_tokens(prompt[:count], "").get(info.key, 0)

    store(96, long=False)
    assert (found(96), found(97)) == (96, 0)
    store(128, long=True)
    assert (found(160), found(64)) == (128, 64)
