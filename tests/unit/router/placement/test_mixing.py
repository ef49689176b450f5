"""Schemes of weights side by side: who serves with whom, whose KV is whose, and which answers say so."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from router.errors import RequestRefused
from router.placement.cluster import Cluster, Role, WorkerInfo
from router.placement.mixing import Mixing
from router.placement.policy import Placement, PolicyParams, RequestFacts, Route, WorkerKey, decide
from router.placement.revisions import Revisions

PLAIN, INT4 = "a" * 32, "b" * 32


def worker(name: str, role: Role, weights: str = "", pairing: str = "kv32") -> WorkerInfo:
    layout = f"{pairing}-{weights or 'plain'}"
    info = WorkerInfo(WorkerKey(name, 1), role, "host:1", "m", layout, 32, 64, 100, 8192, 1000)
    dtype = " ".join(filter(None, ("bfloat16", weights, "kv int8")))
    identity = INT4 if weights else PLAIN
    return replace(
        info, model_identity=identity, dtype=dtype, unquantized_identity=PLAIN, pairing_fingerprint=pairing,
        weights=weights,
    )  # fmt: skip


P, D = worker("p", Role.PREFILL), worker("d", Role.DECODE, "int4 mlp")


class Side:
    def __init__(self, *workers: WorkerInfo, mixed: bool) -> None:
        self.cluster = Cluster(mixed=mixed)
        self.revisions = Revisions(self.cluster, "m", random.Random(0), "refuse")
        for info in workers:
            self.join(info)

    def join(self, info: WorkerInfo) -> None:
        self.revisions.check(info, any_live=True)
        self.cluster.registered(info, 0.0, leaving=False)
        self.cluster.connected(info.key, 0.0)


def test_without_the_word_another_scheme_is_refused_and_the_word_is_named() -> None:
    side = Side(P, mixed=False)
    words = r"\(int4 mlp\) are quantized otherwise .*router\.mixed_quantization: true"
    with pytest.raises(RequestRefused, match=words):
        side.join(D)
    with pytest.raises(RequestRefused, match=r"which it needs, the same engine\.block_tokens"):
        side.join(replace(D, pairing_fingerprint="kv16"))
    with pytest.raises(RequestRefused, match="holds other weights"):
        side.join(replace(D, unquantized_identity="c" * 32))


def test_with_the_word_only_the_scheme_may_differ() -> None:
    side = Side(P, D, mixed=True)
    for other in (
        replace(D, unquantized_identity="c" * 32, model_identity="c" * 32, pairing_fingerprint="other"),
        replace(D, model_identity="d" * 32, pairing_fingerprint=""),
        replace(D, model_identity="d" * 32, pairing_fingerprint="kv16"),
    ):
        with pytest.raises(RequestRefused):
            side.join(replace(other, key=WorkerKey("x", 1)))
    route = decide(RequestFacts(500, 10, Placement.SPLIT), side.cluster.view(), PolicyParams(), 0.0, random.Random(0))
    assert isinstance(route, Route)
    assert (route.prefill, route.decode) == (P.key, D.key)
    (revision,) = side.revisions.in_turn()
    assert revision == f"mixed/{PLAIN}/bfloat16 kv int8"
    assert side.revisions.others(revision) == frozenset()
    with pytest.raises(RequestRefused, match="began on a revision"):
        Side(P, mixed=False).revisions.in_turn(revision)


def test_what_decode_holds_of_a_prompt_is_not_what_another_scheme_hands_over() -> None:
    facts = RequestFacts(320, 10, Placement.SPLIT, cached_tokens={D.key: 160})
    routes = [
        decide(facts, Side(prefill, D, mixed=True).cluster.view(), PolicyParams(), 0.0, random.Random(0))
        for prefill in (P, worker("p", Role.PREFILL, "int4 mlp"))
    ]
    assert [r.estimates["transfer_bytes"] for r in routes if isinstance(r, Route)] == [640.0, 320.0]


def starts(mix: Mixing, info: WorkerInfo, source: WorkerInfo | None = None, **fields: object) -> bool:
    told = {"serves": "", "pulls": "", "num_emitted": 0, "resumed": False, "beside": False, **fields}
    return mix.starts(info, source, **told)  # type: ignore[arg-type]


def test_a_split_between_schemes_is_mixed_and_so_is_what_goes_on_from_it() -> None:
    mix = Mixing()
    assert not starts(mix, P, serves="h1")
    assert starts(mix, D, P, pulls="h1")
    assert mix.mixed == ("none", "int4 mlp")
    assert starts(mix.copy(), D, beside=True)
    assert starts(mix, D, D, pulls="h2", num_emitted=3), "a migration brings it along, between two of one scheme"
    assert starts(mix, D, D, pulls="h2", num_emitted=3), "and to whoever reads it instead"
    assert not starts(mix, D, num_emitted=5), "what is computed anew is its worker's own, whoever chose the tokens"
    assert mix.mixed == ("none", "int4 mlp"), "which the answer is not"


def test_one_scheme_is_never_mixed() -> None:
    mix, prefill = Mixing(), worker("p", Role.PREFILL, "int4 mlp")
    assert not starts(mix, prefill, serves="h1")
    assert not starts(mix, D, prefill, pulls="h1")
    assert not starts(mix, D, D, pulls="h2", num_emitted=2)
    assert not starts(mix, D, beside=True, num_emitted=0)
    assert mix.mixed == ()


def test_what_failed_before_the_first_token_computed_nothing() -> None:
    mix = Mixing()
    starts(mix, P)
    starts(mix, D)
    assert mix.mixed == ()
    starts(mix, P, num_emitted=1)
    assert mix.mixed == ("int4 mlp", "none")


def test_a_source_that_is_not_known_any_more_counts_as_another() -> None:
    assert starts(Mixing(), D, None, pulls="h1")


def test_of_a_resumed_answer_nobody_knows_what_began_it() -> None:
    mix = Mixing()
    starts(mix, D, num_emitted=4, resumed=True)
    assert mix.mixed == ("unknown", "int4 mlp")
