from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import Code
from router.placement.policy import (
    Placement,
    PolicyParams,
    PoolsView,
    Rejection,
    RequestFacts,
    Route,
    WorkerKey,
    WorkerView,
    choose_reader,
    choose_source,
    decide,
)

NOW = 0.0
PARAMS = PolicyParams(itl_target_ms=100.0, max_local_stall_steps=2.0)


def worker(name: str, **changes: object) -> WorkerView:
    view = WorkerView(
        key=WorkerKey(name, 1),
        total_blocks=1000,
        free_blocks=1000,
        block_tokens=32,
        block_bytes=1 << 20,
        backlog_tokens=0,
        running_sequences=0,
        step_ms=20.0,
        prefill_tokens_per_s=1000.0,
        pull_bytes_per_s=5e9,
        layout_fingerprint="kv",
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def route(facts: RequestFacts, decode: list[WorkerView], prefill: list[WorkerView]) -> Route:
    answer = decide(facts, PoolsView.of(decode, prefill), PARAMS, NOW, random.Random(0))
    assert isinstance(answer, Route), answer
    return answer


def rejection(facts: RequestFacts, decode: list[WorkerView], prefill: list[WorkerView]) -> Rejection:
    answer = decide(facts, PoolsView.of(decode, prefill), PARAMS, NOW, random.Random(0))
    assert isinstance(answer, Rejection), answer
    return answer


SHORT, LONG = RequestFacts(40, 100), RequestFacts(4000, 100)


def test_short_prompts_stay_on_decode() -> None:
    r = route(SHORT, [worker("d")], [worker("p")])
    assert (r.split, r.rule) == (False, "short_on_decode")
    assert r.estimates["local_prefill_ms"] == pytest.approx(40.0)


def test_long_prompts_keep_an_idle_decode_worker_free() -> None:
    r = route(LONG, [worker("d")], [worker("p")])
    assert (r.split, r.rule) == (True, "keeps_decode_free")


def test_running_decodes_are_protected() -> None:
    r = route(LONG, [worker("d", running_sequences=4)], [worker("p")])
    assert (r.split, r.rule) == (True, "split_is_faster")


def test_a_busy_prefill_pool_is_not_waited_for() -> None:
    r = route(LONG, [worker("d")], [worker("p", backlog_tokens=20000)])
    assert (r.split, r.rule) == (False, "local_is_faster")


def test_a_backlog_on_decode_makes_even_a_short_prompt_worth_sending() -> None:
    r = route(SHORT, [worker("d", backlog_tokens=5000)], [worker("p")])
    assert (r.split, r.rule) == (True, "split_is_faster")


def test_a_long_prompt_that_decode_has_cached_stays_there() -> None:
    facts = replace(LONG, cached_tokens={WorkerKey("d", 1): 3968})
    r = route(facts, [worker("d")], [worker("p")])
    assert (r.split, r.rule) == (False, "cached_on_decode")


def test_the_decode_worker_with_the_prefix_is_preferred() -> None:
    facts = replace(LONG, cached_tokens={WorkerKey("b", 1): 3000})
    assert route(facts, [worker("a"), worker("b"), worker("c")], []).decode == WorkerKey("b", 1)


def test_a_full_decode_worker_is_avoided() -> None:
    r = route(LONG, [worker("full", free_blocks=3), worker("free", running_sequences=50)], [])
    assert r.decode.worker_id == "free"


def test_the_shorter_backlog_in_seconds_wins_not_in_tokens() -> None:
    slow = worker("slow", backlog_tokens=1000, prefill_tokens_per_s=500.0)
    fast = worker("fast", backlog_tokens=2000, prefill_tokens_per_s=4000.0)
    r = route(LONG, [worker("d", running_sequences=1)], [slow, fast])
    assert r.prefill == WorkerKey("fast", 1)


def test_slow_transfer_is_counted() -> None:
    r = route(replace(LONG), [worker("d", pull_bytes_per_s=5e6)], [worker("p")])
    assert (r.split, r.rule) == (False, "local_is_faster")
    assert r.estimates["transfer_ms"] > 1000


@pytest.mark.parametrize(("placement", "split"), [(Placement.LOCAL, False), (Placement.SPLIT, True)])
def test_pins_are_obeyed(placement: Placement, split: bool) -> None:
    for facts in (SHORT, LONG):
        assert route(replace(facts, placement=placement), [worker("d")], [worker("p")]).split is split


def test_no_prefill_pool_runs_everything_local_and_says_so() -> None:
    assert route(LONG, [worker("d")], []).rule == "no_prefill_worker"
    other = worker("p", layout_fingerprint="other")
    assert route(LONG, [worker("d")], [other]).rule == "no_compatible_prefill_worker"
    refused = rejection(replace(LONG, placement=Placement.SPLIT), [worker("d")], [])
    assert refused.failure.code is Code.FAILED_PRECONDITION


def test_no_decode_pool_is_unavailable_with_a_hint() -> None:
    refused = rejection(SHORT, [], [worker("p")])
    assert refused.failure.code is Code.UNAVAILABLE
    assert refused.failure.retry_after_ms > 0


def test_a_prompt_larger_than_every_pool_is_refused_before_any_work() -> None:
    refused = rejection(RequestFacts(40_000, 1), [worker("d")], [worker("p")])
    assert refused.failure.code is Code.INVALID_ARGUMENT
    assert "40000" in refused.failure.message
    assert "32000" in refused.failure.message


def test_excluded_workers_are_not_chosen() -> None:
    facts = replace(SHORT, exclude=frozenset([WorkerKey("a", 1)]))
    assert route(facts, [worker("a"), worker("b")], []).decode.worker_id == "b"
    assert rejection(facts, [worker("a")], []).failure.code is Code.UNAVAILABLE


def test_equals_are_shared_out() -> None:
    rng = random.Random(1)
    view = PoolsView.of([worker(f"d{i}") for i in range(4)], [])
    chosen = {decide(SHORT, view, PARAMS, NOW, rng).decode.worker_id for _ in range(64)}  # type: ignore[union-attr]
    assert len(chosen) == 4


LOADS = st.tuples(st.integers(0, 1000), st.integers(0, 50_000), st.integers(0, 64), st.floats(0, 1e5))


@given(
    st.integers(1, 50_000),
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 50_000), st.integers(0, 64), st.floats(0, 1e5)), max_size=20
    ),
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 50_000), st.integers(0, 64), st.floats(0, 1e5)), max_size=20
    ),
    st.sampled_from(Placement),
)
def test_total_for_every_view(prompt: int, decode: list, prefill: list, placement: Placement) -> None:
    def build(kind: str, rows: list) -> list[WorkerView]:
        return [
            worker(f"{kind}{i}", free_blocks=f, backlog_tokens=b, running_sequences=r, prefill_tokens_per_s=rate)
            for i, (f, b, r, rate) in enumerate(rows)
        ]

    view = PoolsView.of(build("d", decode), build("p", prefill))
    answer = decide(RequestFacts(prompt, 10, placement), view, PARAMS, NOW, random.Random(0))
    if isinstance(answer, Route):
        assert answer.decode.worker_id.startswith("d")
        assert answer.rule
        assert answer.prefill is None or answer.prefill.worker_id.startswith("p")
    else:
        assert answer.failure.message


# Admission.


def test_what_would_miss_its_deadline_is_refused_before_any_work() -> None:
    facts = RequestFacts(4000, 100, time_left_s=3.0)
    failure = rejection(facts, [worker("d", backlog_tokens=1000)], [worker("p", backlog_tokens=1000)]).failure
    assert failure.code is Code.RESOURCE_EXHAUSTED
    assert "would take about" in failure.message
    assert failure.retry_after_ms >= 200
    failure = rejection(facts, [worker("d")], [worker("p", backlog_tokens=1000)]).failure
    assert failure.retry_after_ms == 0, "nothing waits there: it would be as late whenever it came"
    assert "retry" not in failure.message
    assert route(replace(facts, time_left_s=10.0), [worker("d")], [worker("p")]).split


def test_the_answers_own_time_counts_as_far_as_it_is_known() -> None:
    facts = RequestFacts(40, 1000, time_left_s=10.0, expected_tokens=1000)
    assert rejection(facts, [worker("d", step_ms=20.0)], []).failure.code is Code.RESOURCE_EXHAUSTED
    assert not route(replace(facts, expected_tokens=100), [worker("d", step_ms=20.0)], []).split


def test_nobody_is_refused_on_guesses() -> None:
    facts = RequestFacts(4000, 100, time_left_s=0.5)
    assert route(facts, [worker("d", prefill_tokens_per_s=0.0)], [])


def test_a_backlog_is_bounded_in_seconds_and_priority_passes_it() -> None:
    params = replace(PARAMS, max_backlog_s=5.0)
    view = PoolsView.of([worker("d", backlog_tokens=9000)], [worker("p", backlog_tokens=8000)])
    refused = decide(LONG, view, params, NOW, random.Random(0))
    assert isinstance(refused, Rejection)
    assert refused.failure.code is Code.RESOURCE_EXHAUSTED
    assert 2000 <= refused.failure.retry_after_ms <= 4000
    assert isinstance(decide(replace(LONG, priority=1), view, params, NOW, random.Random(0)), Route)
    assert isinstance(decide(replace(LONG, admitted=True), view, params, NOW, random.Random(0)), Route), "a recovery"


# Paths and recovery.


def test_nothing_is_split_over_a_broken_path() -> None:
    decode, first, second = worker("d"), worker("p1"), worker("p2", backlog_tokens=500)
    broken = frozenset({(first.key, decode.key)})
    answer = decide(LONG, PoolsView.of([decode], [first, second], broken), PARAMS, NOW, random.Random(0))
    assert isinstance(answer, Route)
    assert answer.prefill == second.key
    answer = decide(LONG, PoolsView.of([decode], [first], broken), PARAMS, NOW, random.Random(0))
    assert isinstance(answer, Route)
    assert (answer.split, answer.rule) == (False, "paths_broken")
    pinned = decide(
        replace(LONG, placement=Placement.SPLIT), PoolsView.of([decode], [first], broken), PARAMS, NOW, random.Random(0)
    )
    assert isinstance(pinned, Rejection)
    assert pinned.failure.code is Code.FAILED_PRECONDITION


def test_another_source_only_where_it_is_quicker() -> None:
    decode, lost, other = worker("d"), worker("p1"), worker("p2")
    view, rng = PoolsView.of([decode], [lost, other]), random.Random(0)
    facts = replace(LONG, exclude=frozenset({lost.key}))
    found = choose_source(facts, view, PARAMS, NOW, rng, decode.key)
    assert found is not None
    assert (found.decode, found.prefill) == (decode.key, other.key)
    nearly_all = replace(facts, cached_tokens={decode.key: 3990})
    assert choose_source(nearly_all, view, PARAMS, NOW, rng, decode.key) is None, "the rest is quicker here"
    assert choose_source(facts, PoolsView.of([decode], [lost]), PARAMS, NOW, rng, decode.key) is None
    assert choose_source(facts, PoolsView.of([], [other]), PARAMS, NOW, rng, decode.key) is None, "it is gone meanwhile"


def test_another_reader_has_room_and_a_path() -> None:
    source, full, cut, able = worker("p"), worker("d1", free_blocks=3), worker("d2"), worker("d3")
    view = PoolsView.of([full, cut, able], [source], frozenset({(source.key, cut.key)}))
    assert choose_reader(LONG, view, PARAMS, NOW, random.Random(0), source.key) == able.key
    nobody = replace(LONG, exclude=frozenset({able.key}))
    assert choose_reader(nobody, view, PARAMS, NOW, random.Random(0), source.key) is None


def test_the_longest_answer_fits_where_it_is_placed_if_it_fits_anywhere() -> None:
    """A worker refuses what its pool might not hold in the end: more than chance decides between two of them."""
    small, large = (
        worker("small", total_blocks=200, free_blocks=200),
        worker("large", total_blocks=400, running_sequences=9),
    )
    many = [replace(small, key=WorkerKey(f"small{i}", 1)) for i in range(40)]
    for decode in ([small, large], [*many, large]):
        assert route(RequestFacts(4000, 6000), decode, []).decode == large.key
    assert route(RequestFacts(4000, 20_000), [small], []).decode == small.key, "the worker says why it cannot"
