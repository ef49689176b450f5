"""The scaling policy, one situation after another: what is seen, what is decided, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scaling.config import ScalingConfig, ScalingError, check
from scaling.decision import Decision
from scaling.demand import Capacity, demand, sample
from scaling.observation import Observation, Pool, Stage, WorkerSeen
from scaling.policy import decide
from scaling.state import ScalingState
from scaling.weighing import Terms

RATE = 30_000.0  # prompt tokens a second of one worker
CAPACITY = 800_000  # KV tokens of one worker
TERMS = Terms(itl_target_ms=50.0)
CONFIG = ScalingConfig(budget_gpus=8, start_s=40.0)


def worker(
    name: str, pool: Pool | None, stage: Stage = Stage.READY, age_s: float = 1000.0, **more: float
) -> WorkerSeen:
    seen = WorkerSeen(
        name,
        pool,
        stage,
        age_s,
        started_in_s=40.0 if stage is Stage.READY else 0.0,
        kv_capacity_tokens=CAPACITY,
        prefill_tokens_per_s=RATE,
        step_constant_ms=5.0,
        step_per_sequence_ms=0.01,
        step_per_context_token_ms=3.4e-5,
    )
    return replace(seen, **more)


class Cluster:
    """Pools that do at once what is decided, under a given load. `starts`: new workers are not ready at once."""

    def __init__(self, prefill: int, decode: int, config: ScalingConfig = CONFIG) -> None:
        self.config = config
        self.state = ScalingState()
        self.now = 0.0
        self.workers = [worker(f"p{i}", Pool.PREFILL) for i in range(prefill)]
        self.workers += [worker(f"d{i}", Pool.DECODE) for i in range(decode)]
        self.named = 0
        self.decided: list[Decision] = []
        self.targets: list[int] | None = [prefill, decode]
        self.starts = False

    def pair(self) -> tuple[int, int]:
        alive = [w for w in self.workers if w.stage is not Stage.DRAINING]
        return sum(w.pool is Pool.PREFILL for w in alive), sum(w.pool is Pool.DECODE for w in alive)

    def see(
        self, requests_per_s: float, prompt: int = 6000, answer: int = 300, kv: int = 0, **more: object
    ) -> Decision:
        """One interval later."""
        interval = self.config.interval_s
        self.now += interval
        arrived = round(requests_per_s * interval)
        decodes = [w for w in self.workers if w.pool is Pool.DECODE and w.stage is Stage.READY]
        context = prompt + answer // 2
        kv = kv or int(requests_per_s * context * answer * 0.02)
        shares = {w.worker_id: kv // len(decodes) for w in decodes}
        self.workers = [
            replace(
                w,
                age_s=w.age_s + interval,
                kv_tokens=shares.get(w.worker_id, 0),
                running_sequences=max(1, shares.get(w.worker_id, 0) // context),
            )
            for w in self.workers
        ]
        seen = Observation(
            self.now, interval, tuple(self.workers), arrived, arrived * prompt, arrived * prompt, arrived,
            arrived * answer, live_requests=1 + arrived if requests_per_s else 0,
            prefill_target=self.targets[0] if self.targets else None,
            decode_target=self.targets[1] if self.targets else None,
        )  # fmt: skip
        decision, self.state = decide(replace(seen, **more), self.state, self.config, TERMS)
        self.decided.append(decision)
        if not decision.dry_run:
            self.apply(decision)
        return decision

    def apply(self, decision: Decision) -> None:
        self.targets = [decision.prefill, decision.decode]
        giving = Pool.DECODE if decision.shifted > 0 else Pool.PREFILL
        for _ in range(abs(decision.shifted)):
            at = next(i for i, w in enumerate(self.workers) if w.pool is giving and w.stage is Stage.READY)
            self.workers[at] = replace(self.workers[at], pool=giving.other)
        for pool, wanted in ((Pool.PREFILL, decision.prefill), (Pool.DECODE, decision.decode)):
            while self.pair()[pool is Pool.DECODE] > wanted:
                mine = [w for w in self.workers if w.pool is pool and w.stage is not Stage.DRAINING]
                order = [Stage.UNSCHEDULABLE, Stage.STARTING, Stage.READY]
                self.workers.remove(min(mine, key=lambda w: order.index(w.stage)))
            while self.pair()[pool is Pool.DECODE] < wanted:
                self.named += 1
                stage = Stage.STARTING if self.starts else Stage.READY
                standby = next((w for w in self.workers if w.stage is Stage.STANDBY), None)
                if standby is not None:
                    self.workers.remove(standby)
                self.workers.append(worker(f"n{self.named}", pool, stage, 0.0))

    def settle(self, requests_per_s: float, seconds: float = 300.0, **more: int) -> list[Decision]:
        until = self.now + seconds
        begun = len(self.decided)
        while self.now < until:
            self.see(requests_per_s, **more)
        return self.decided[begun:]


def test_enough_is_left_alone_and_the_numbers_say_why() -> None:
    cluster = Cluster(2, 1)
    decision = cluster.settle(7.0, 60.0)[-1]
    assert (decision.rule, decision.pair, decision.changes) == ("steady", (2, 1), False)
    assert decision.numbers["uncached_tokens_per_s"] == pytest.approx(42_000)
    assert decision.numbers["prefill_load_ahead"] == pytest.approx(1.4, rel=0.05)
    assert decision.numbers["start_s"] == 40.0
    stop = next(a for a in decision.alternatives if (a.prefill, a.decode) == (1, 1))
    assert (stop.what, stop.prefill_strain > 0.95, stop.verdict) == ("stop", True, "above 0.95")


def test_a_role_that_is_short_takes_a_worker_from_one_that_is_not_before_any_is_started() -> None:
    cluster = Cluster(4, 1)
    decided = cluster.settle(4.0, 60.0, kv=1_500_000)
    moves = [d for d in decided if d.changes]
    assert moves[0].rule == "shift_to_decode"
    assert moves[0].started == 0
    assert sum(moves[0].pair) == 5
    assert moves[0].decode >= 2


def test_without_shifts_the_same_is_a_start() -> None:
    cluster = Cluster(4, 1, CONFIG.model_copy(update={"shift_roles": False}))
    moves = [d for d in cluster.settle(4.0, 20.0, kv=1_500_000) if d.changes]
    assert moves[0].rule == "start"
    assert all(d.shifted == 0 for d in moves)


def test_a_standby_is_woken_before_any_is_started() -> None:
    cluster = Cluster(1, 1, CONFIG.model_copy(update={"standbys": 1}))
    cluster.workers.append(worker("s0", None, Stage.STANDBY))
    decision = cluster.see(8.0)
    assert (decision.rule, decision.woken, decision.started) == ("wake", 1, 0)


def test_a_start_waits_for_a_second_look_unless_it_is_bad_already() -> None:
    cluster = Cluster(2, 1)
    cluster.settle(5.0, 100.0)
    while (decision := cluster.see(10.5)).rule == "steady":
        pass
    assert decision.rule == "short"
    assert cluster.see(10.5).rule == "start"


def test_a_backlog_is_demand_although_nothing_arrives_any_more() -> None:
    """What waits in queues counts: an estimate that knows only arrivals sees an idle cluster here."""
    cluster = Cluster(1, 1)
    cluster.settle(4.0, 60.0)
    cluster.workers[0] = replace(cluster.workers[0], backlog_tokens=4_000_000, longest_prompt_tokens=8000)
    decision = cluster.see(0.5)
    assert decision.numbers["backlog_s"] > 50
    assert sum(cluster.pair()) > 2 or cluster.see(0.5).started > 0


def test_one_prompt_that_is_too_long_for_any_target_holds_nothing() -> None:
    cluster = Cluster(3, 1)
    cluster.workers[0] = replace(cluster.workers[0], backlog_tokens=900_000, longest_prompt_tokens=900_000)
    decided = cluster.settle(0.4, 200.0)
    assert decided[-1].numbers["backlog_tokens"] == 0
    assert cluster.pair() == (1, 1)


def test_fewer_must_do_for_some_time_and_under_their_larger_share() -> None:
    cluster = Cluster(4, 1)
    cluster.settle(14.0, 100.0)
    high = cluster.pair()
    low = cluster.settle(5.0, 200.0)
    rules = [d.rule for d in low]
    assert rules.index("hold") < rules.index("stop")
    stop = low[rules.index("stop")]
    assert stop.at - low[rules.index("hold")].at >= stop.numbers["start_s"] / 2
    assert sum(cluster.pair()) < sum(high)
    rates = stop.numbers["prefill_load_ahead"] + stop.numbers["prefill_spare"]
    assert rates / stop.prefill <= CONFIG.down_margin + 0.3  # decode's free time carries the rest


def test_nothing_is_stopped_while_somebody_is_missing() -> None:
    cluster = Cluster(4, 1)
    cluster.settle(14.0, 100.0)
    cluster.starts = True
    count = sum(cluster.pair())
    dead = cluster.workers.pop(0)
    cluster.workers.append(worker("again", dead.pool, Stage.STARTING, 0.0))
    decided = cluster.settle(11.0, 100.0)
    assert all(sum(d.pair) >= count - 1 for d in decided)
    assert "stop" not in [d.rule for d in decided if sum(d.pair) > count - 1]


def test_a_count_set_by_hand_is_adopted_and_kept() -> None:
    cluster = Cluster(2, 1)
    cluster.settle(6.0, 60.0)
    assert cluster.targets is not None
    cluster.targets[1] = 3
    cluster.workers += [worker("h1", Pool.DECODE), worker("h2", Pool.DECODE)]
    decided = cluster.settle(6.0, 300.0)
    assert all(d.decode == 3 for d in decided)
    assert "set by hand: decode 3" in decided[-1].why
    later = cluster.settle(2.0, 600.0)
    assert later[-1].decode < 3
    assert "by hand" not in later[-1].why


def test_what_finds_no_place_is_spent_then_withdrawn_then_asked_for_again_later() -> None:
    cluster = Cluster(1, 1, CONFIG.model_copy(update={"shift_roles": False}))
    cluster.settle(2.0, 60.0)
    cluster.starts = True
    while not cluster.see(12.0).started:
        pass
    cluster.workers = [
        replace(w, stage=Stage.UNSCHEDULABLE) if w.stage is Stage.STARTING else w for w in cluster.workers
    ]
    asked = cluster.pair()
    decided = cluster.settle(12.0, 60.0)
    rules = [d.rule for d in decided]
    assert all(d.pair == asked for d in decided[: rules.index("withdrawn")])
    withdrawn = decided[rules.index("withdrawn")]
    assert withdrawn.pair == (1, 1)
    assert withdrawn.withdrawn == sum(asked) - 2
    assert "no_place" in rules[rules.index("withdrawn") :]
    assert "start" in [d.rule for d in cluster.settle(12.0, 150.0)]


def test_what_a_worker_measures_while_it_warms_up_teaches_nothing() -> None:
    cluster = Cluster(2, 1)
    cluster.settle(6.0, 60.0)
    known = cluster.state.capacity
    slow = worker("cold", Pool.PREFILL, age_s=1.0, prefill_tokens_per_s=500.0)
    cluster.workers.append(slow)
    cluster.targets = [3, 1]
    cluster.see(6.0)
    assert cluster.state.capacity.prefill_tokens_per_s == known.prefill_tokens_per_s


def test_an_idle_cluster_goes_to_zero_and_comes_back_for_the_first_request() -> None:
    cluster = Cluster(1, 2, CONFIG.model_copy(update={"idle_s": 120.0}))
    cluster.settle(3.0, 60.0)
    decided = cluster.settle(0.0, 200.0)
    assert [d.rule for d in decided].count("to_zero") == 1
    assert cluster.pair() == (0, 0)
    assert all((d.prefill == 0) == (d.decode == 0) for d in decided)
    decision = cluster.see(0.0, queued_requests=1, queued_tokens=100)
    assert (decision.rule, decision.pair) == ("from_zero", (1, 1))


def test_workers_that_start_for_longer_than_a_cluster_may_idle_are_not_stopped_before_they_were_of_use() -> None:
    cluster = Cluster(0, 0, CONFIG.model_copy(update={"idle_s": 20.0}))
    cluster.starts = True
    assert cluster.see(0.0, queued_requests=1, queued_tokens=100).rule == "from_zero"
    decided = cluster.settle(0.0, 100.0)  # whoever asked has gone
    assert cluster.pair() == (1, 1)
    assert "to_zero" not in {d.rule for d in decided}
    cluster.workers = [replace(w, stage=Stage.READY) for w in cluster.workers]
    rules = [d.rule for d in cluster.settle(0.0, 30.0)]
    assert rules.index("to_zero") * CONFIG.interval_s >= 15.0, "and have their time"


def test_a_dry_run_says_what_it_would_do_and_is_not_taken_for_a_hand() -> None:
    cluster = Cluster(1, 1, CONFIG.model_copy(update={"dry_run": True}))
    decided = cluster.settle(10.0, 60.0)
    assert cluster.pair() == (1, 1)
    assert decided[-1].dry_run
    assert sum(decided[-1].pair) > 2
    assert "by hand" not in decided[-1].why


def test_a_load_that_rises_steadily_is_met_before_it_is_there() -> None:
    cluster = Cluster(4, 1)
    cluster.settle(6.0, 100.0)
    for i in range(20):
        decision = cluster.see(6.0 + i * 0.2)
    ahead = decision.numbers["requests_per_s_ahead"] - decision.numbers["requests_per_s"]
    assert ahead == pytest.approx(0.04 * decision.numbers["ahead_s"], rel=0.3)


def test_a_step_is_no_trend() -> None:
    cluster = Cluster(4, 1)
    cluster.settle(3.0, 100.0)
    highest = max(d.numbers["requests_per_s_ahead"] for d in cluster.settle(9.0, 120.0))
    assert highest == pytest.approx(9.0, rel=0.1)


def test_nothing_measured_means_nothing_done() -> None:
    cluster = Cluster(1, 1)
    cluster.workers = [replace(w, prefill_tokens_per_s=0.0) for w in cluster.workers]
    assert cluster.see(20.0).rule == "nothing_measured"


@pytest.mark.parametrize(
    ("settings", "gpus", "words"),
    [
        ({"budget_gpus": 1}, (1, 1), "raise the budget"),
        ({"budget_gpus": 4, "standbys": 3}, (1, 1), "lower it"),
        ({"budget_gpus": 8}, (1, 2), "shift_roles to false"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, float], gpus: tuple[int, int], words: str) -> None:
    with pytest.raises(ScalingError, match=words):
        check(ScalingConfig.model_validate(settings), *gpus)


def test_workers_that_take_few_sequences_count_as_their_share_of_the_pool() -> None:
    """The mean of what the pool's workers can do, as for everything else."""

    def sequences(*limits: int) -> float:
        decodes = [worker(f"d{i}", Pool.DECODE, max_sequences=n) for i, n in enumerate(limits)]
        decodes = [replace(one, running_sequences=4, kv_tokens=4000) for one in decodes]
        seen = Observation(10.0, 5.0, tuple(decodes))
        return demand(seen, [sample(seen)], Capacity(), CONFIG, 50.0).capacity.sequences

    assert sequences(64, 64) == 64
    assert sequences(64, 16) == 40
    assert sequences(64, 0) == 64
