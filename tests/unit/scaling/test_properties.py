"""What holds whatever is seen: sequences of observations that no cluster would produce, and of some that would."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.config import ScalingConfig
from scaling.observation import Observation, Pool, Stage, WorkerSeen
from scaling.policy import decide
from scaling.state import ScalingState
from scaling.weighing import Terms, spent_gpus
from tests.unit.scaling.test_policy import CONFIG, Cluster

counts = st.integers(0, 9)
tokens = st.integers(0, 3_000_000)


@st.composite
def workers(draw: st.DrawFn) -> WorkerSeen:
    stage = draw(st.sampled_from(Stage))
    pool = None if stage is Stage.STANDBY else draw(st.sampled_from(Pool))
    measured = draw(st.booleans())
    return WorkerSeen(
        "w",
        pool,
        stage,
        draw(st.floats(0, 1000)),
        draw(st.sampled_from([0.0, 20.0, 90.0])),
        draw(tokens),
        draw(tokens),
        draw(st.integers(0, 300)),
        draw(tokens),
        draw(tokens),
        1_000_000 * measured,
        30_000.0 * measured,
        5.0 * measured,
        0.01,
        3e-5,
        draw(st.sampled_from([1.0, 2.5])),
    )


@st.composite
def observations(draw: st.DrawFn) -> list[Observation]:
    now, seen = 0.0, []
    for _ in range(draw(st.integers(1, 5))):
        now += draw(st.sampled_from([0.1, 5.0, 60.0, 700.0]))
        arrived = draw(st.integers(0, 500))
        target = draw(st.booleans())
        seen.append(
            Observation(
                now,
                draw(st.sampled_from([0.1, 5.0, 60.0])),
                tuple(draw(st.lists(workers(), max_size=6))),
                arrived,
                arrived * 5000,
                draw(tokens),
                draw(st.integers(0, 500)),
                draw(tokens),
                draw(st.integers(0, 3)),
                draw(tokens),
                draw(tokens),
                draw(st.integers(0, 50)),
                draw(counts) if target else None,
                draw(counts) if target else None,
            )
        )
    return seen


configs = st.builds(
    ScalingConfig,
    budget_gpus=st.integers(4, 12),
    standbys=st.integers(0, 2),
    idle_s=st.sampled_from([None, 60.0]),
    shift_roles=st.booleans(),
    dry_run=st.booleans(),
    hold_s=st.sampled_from([None, 0.0]),
)


@settings(max_examples=30, deadline=None)
@given(observations(), configs, st.sampled_from([(1.0, 1.0), (2.0, 1.0)]))
def test_whatever_is_seen(seen: list[Observation], config: ScalingConfig, gpus: tuple[float, float]) -> None:
    terms = Terms(50.0, *gpus)
    state = ScalingState()
    for observation in seen:
        decision, state = decide(observation, state, config, terms)
        assert config.budget_gpus is not None
        leaving = spent_gpus(observation, terms)
        held = terms.gpus(decision.pair)
        # The budget is never exceeded; and nothing is added to what is on its way out.
        assert held <= config.budget_gpus
        asked = observation.prefill_target, observation.decode_target
        known = None not in asked
        if decision.started and not decision.shifted and decision.rule not in ("limits", "from_zero"):
            assert held + decision.standbys * terms.standby_gpus + leaving <= config.budget_gpus + 1e-9
        # Never zero of one role.
        assert (decision.prefill == 0) == (decision.decode == 0)
        assert decision.prefill or config.idle_s is not None
        # One kind of move: up or down or across.
        assert sum(bool(x) for x in (decision.shifted, decision.started + decision.woken, decision.stopped)) <= 1
        if known and decision.rule != "limits" and decision.prefill:
            up = decision.prefill > asked[0] or decision.decode > asked[1]
            down = decision.prefill < asked[0] or decision.decode < asked[1]
            if up and down:
                assert decision.shifted
                assert sum(decision.pair) == sum(asked)
        assert decision.why
        assert all(value == value for value in decision.numbers.values())


@settings(max_examples=15, deadline=None)
@given(st.floats(0.2, 20.0), st.integers(500, 12_000), st.integers(10, 2000), st.integers(1, 5), st.integers(1, 3))
def test_under_a_constant_load_nothing_moves_after_convergence(
    rate: float, prompt: int, answer: int, prefill: int, decode: int
) -> None:
    cluster = Cluster(prefill, decode)
    cluster.settle(rate, 400.0, prompt=prompt, answer=answer)
    later = cluster.settle(rate, 300.0, prompt=prompt, answer=answer)
    assert not [d.rule for d in later if d.changes]
    assert sum(cluster.pair()) <= 8


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 25.0), st.integers(1, 30)), min_size=2, max_size=6),
    st.lists(st.integers(0, 5), max_size=6),
    st.booleans(),
)
def test_under_any_load_with_deaths_no_role_is_left_without_a_worker_and_the_budget_holds(
    loads: list[tuple[float, int]], deaths: list[int], starts: bool
) -> None:
    """A worker that dies during a scale-down is replaced: the counts that are asked for stay what the load needs."""
    cluster = Cluster(2, 2)
    cluster.starts = starts
    for i, (rate, looks) in enumerate(loads):
        for _ in range(looks):
            before = sum(cluster.pair())
            decision = cluster.see(rate)
            assert sum(decision.pair) <= 8
            assert min(decision.pair) >= 1
            if decision.rule == "stop":
                need = decision.numbers["prefill_load_ahead"] + decision.numbers["decode_load_ahead"]
                assert sum(decision.pair) >= need
            assert sum(cluster.pair()) <= max(8, before)
        if i < len(deaths) and len(cluster.workers) > deaths[i]:
            dead = cluster.workers.pop(deaths[i])
            assert dead.pool is not None
            cluster.workers.append(WorkerSeen("again", dead.pool, Stage.STARTING, 0.0))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(Pool), st.integers(1, 4), st.floats(0.5, 12.0))
def test_a_count_set_by_hand_stays(pool: Pool, count: int, rate: float) -> None:
    cluster = Cluster(2, 2)
    cluster.settle(rate, 60.0)
    assert cluster.targets is not None
    mine = 0 if pool is Pool.PREFILL else 1
    decided = cluster.decided[-1].pair
    if decided[1 - mine] + count > 8:
        return
    cluster.targets[mine] = count
    changed = decided[mine] != count
    for decision in cluster.settle(rate, CONFIG.hand_hold_s - 60.0):
        if changed:
            assert decision.pair[mine] == count
