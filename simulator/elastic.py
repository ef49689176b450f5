"""A fast cluster whose pools change while it runs: what a scaler asks for, and what the platform makes of it.

    asked for ──no place──> unschedulable ──a place──> starting ──start_s──> ready <──wake_s── standby
                   └──────────── a place ─────────────────^                  │  ^               ^
                                                                     another role (at once)     │
                                                                             └──> draining ──empty──> gone

A worker that changes its role goes on with what it has, and keeps its prefix cache. A draining one is sent nothing and
is gone when its last answer has ended. What dies is started again, as Serve does. GPU time is counted from the moment
that a worker has its place until it is gone; a scaler sees what routers and platform would tell it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from router.placement.cluster import Role
from scaling.decision import Decision
from scaling.observation import Observation, Pool, Stage, WorkerSeen
from simulator.cost_model import CostModel
from simulator.fast import FastCluster
from simulator.flights import BLOCK_TOKENS, REPORT_SLOTS, FastWorker, Flight
from simulator.jobs import Job
from simulator.leap_worker import LeapWorker
from simulator.outcome import WARM_UP_SHARE, Outcome
from simulator.policies import Adaptive
from simulator.spec import ClusterSpec
from simulator.traces import Trace

_LOOK_S = 0.5  # how often the platform looks who has left
_ROLES = {Pool.PREFILL: Role.PREFILL, Pool.DECODE: Role.DECODE}


class Scaler(Protocol):
    @property
    def name(self) -> str: ...

    def decide(self, seen: Observation) -> Decision: ...


@dataclass(frozen=True, slots=True)
class Platform:
    """`places` are (from when, how many workers have a place at most). `deaths` are (when, which role)."""

    places: Sequence[tuple[float, int]] = ((0.0, 16),)
    start_s: float = 45.0
    start_jitter: float = 0.1
    wake_s: float = 2.0
    interval_s: float = 5.0
    deaths: Sequence[tuple[float, Pool]] = ()

    def places_at(self, now: float) -> int:
        return [count for at, count in self.places if at <= now][-1]


@dataclass(slots=True, eq=False)
class Unit:
    """A worker as the platform knows it."""

    pool: Pool | None
    stage: Stage
    since: float
    held_from: float | None = None  # None: no place yet
    started_in_s: float = 0.0
    fast: FastWorker | None = None
    timer: Any = None


@dataclass(slots=True)
class Counts:
    """Since the last look."""

    arrived: int = 0
    prompt_tokens: int = 0
    uncached_tokens: int = 0
    ended: int = 0
    answer_tokens: int = 0


@dataclass(slots=True)
class Story:
    """What became of the pools."""

    decisions: list[Decision] = field(default_factory=list)
    moves: list[tuple[float, int]] = field(default_factory=list)  # (when, workers moved)
    most_held: int = 0
    gpu_s: float = 0.0
    counted_s: float = 0.0
    pairs: list[tuple[float, int, int]] = field(default_factory=list)  # ready workers at each look


class ElasticCluster(FastCluster):
    """`spec` gives the pools at the beginning."""

    def __init__(
        self,
        spec: ClusterSpec,
        costs: CostModel,
        scaler: Scaler,
        platform: Platform,
        seed: int,
        most_live: int = 0,
    ) -> None:
        """With more than `most_live` requests at once the run is given up, and what has not ended counts as missed."""
        super().__init__(spec, costs, Adaptive(), seed)
        self._most_live = most_live
        self.given_up = False
        self.scaler, self.platform = scaler, platform
        self.story = Story()
        self.chance = random.Random(f"{seed}/platform")
        self.units = [Unit(Pool(w.role.value), Stage.READY, -1e9, -1e9, 0.0, w) for w in self.workers]
        self.wanted: dict[Pool | None, int] = {
            Pool.PREFILL: spec.prefill.workers, Pool.DECODE: spec.decode.workers, None: 0
        }  # fmt: skip
        self._waiting: list[Flight] = []  # for any decode worker
        self._counts = Counts()
        self._looked_at = 0.0
        self._window = (0.0, math.inf)

    def run(self, trace: Trace, on_done: Callable[[int], None] | None = None) -> list[Outcome]:
        self._block_tokens = trace.block_tokens
        first = trace.requests[int(len(trace.requests) * WARM_UP_SHARE)].arrival_s
        self._window = first, trace.requests[-1].arrival_s
        self.story.counted_s = self._window[1] - first
        self.loop.at(self.platform.interval_s, self._scale)
        self.loop.at(_LOOK_S, self._look)
        for at_s, pool in self.platform.deaths:
            self.loop.at(at_s, self._die, pool)
        outcomes = super().run(trace, on_done)
        outcomes += [
            Outcome(number, r.arrival_s, r.prompt_tokens, r.output_tokens, 0.0)
            for number, r in enumerate(trace.requests[len(outcomes) :], len(outcomes))
        ]  # of a run that was given up
        for unit in self.units:
            self._let_go(unit)
        return outcomes

    def _start_reports(self) -> None:
        self.reports.start(0.0, REPORT_SLOTS)

    # Requests.

    def _dispatch(self, flight: Flight) -> None:
        if not self.cluster.view().decode:
            self._waiting.append(flight)
            return
        super()._dispatch(flight)
        estimates = flight.estimates
        if not estimates:
            return
        counts = self._counts
        where = "prefill" if flight.outcome.split else "decode"
        counts.uncached_tokens += int(estimates[f"uncached_on_{where}_tokens"])
        if not flight.outcome.moves:
            counts.arrived += 1
            counts.prompt_tokens += flight.request.prompt_tokens

    def _answered(self, engine: LeapWorker, job: Job) -> None:
        self._counts.ended += 1
        self._counts.answer_tokens += job.flight.outcome.output_tokens
        super()._answered(engine, job)

    # What a scaler sees.

    def observe(self) -> Observation:
        now, counts = self.loop.now, self._counts
        covers_s, self._looked_at, self._counts = now - self._looked_at, now, Counts()
        queued = [f.request.prompt_tokens for f in self._waiting]
        return Observation(
            now,
            covers_s,
            tuple(self._seen(unit, i, now) for i, unit in enumerate(self.units)),
            counts.arrived,
            counts.prompt_tokens,
            counts.uncached_tokens,
            counts.ended,
            counts.answer_tokens,
            len(queued),
            sum(queued),
            max(queued, default=0),
            self._live,
            self.wanted[Pool.PREFILL],
            self.wanted[Pool.DECODE],
        )

    def _seen(self, unit: Unit, number: int, now: float) -> WorkerSeen:
        worker = unit.fast
        age_s = now - unit.since
        if worker is None or worker.said is None:
            return WorkerSeen(f"w{number}", unit.pool, unit.stage, age_s, unit.started_in_s)
        load, engine = worker.said, worker.engine
        return WorkerSeen(
            worker.key.worker_id,
            unit.pool,
            unit.stage,
            age_s,
            unit.started_in_s,
            load.prefill_backlog_tokens,
            max((j.goal - j.computed for j in (*engine.waiting, *engine.prefills)), default=0),
            load.running_sequences,
            (load.total_blocks - load.free_blocks) * BLOCK_TOKENS,
            load.waiting_blocks * BLOCK_TOKENS,
            load.total_blocks * BLOCK_TOKENS,
            load.prefill_tokens_per_s,
            load.step_constant_ms,
            load.step_per_sequence_ms + load.step_per_token_ms,
            load.step_per_context_token_ms,
            max_sequences=engine.limits.max_running_sequences,
        )

    def _scale(self, _: object) -> None:
        seen = self.observe()
        decision = self.scaler.decide(seen)
        self.story.decisions.append(decision)
        self.story.pairs.append((seen.now, seen.count(Pool.PREFILL, Stage.READY), seen.count(Pool.DECODE, Stage.READY)))
        if not decision.dry_run:
            self.apply(decision)
        if self._most_live and self._live > self._most_live:
            self.given_up = True
            self.loop.stop()
        elif self._going():
            self.loop.at(self.loop.now + self.platform.interval_s, self._scale)

    # What the platform does.

    def apply(self, decision: Decision) -> None:
        before = self.wanted[Pool.PREFILL], self.wanted[Pool.DECODE]
        giving = Pool.DECODE if decision.shifted > 0 else Pool.PREFILL
        movable = sorted((u for u in self.units if u.pool is giving and u.stage is Stage.READY), key=self._work_of)
        shifted = movable[: abs(decision.shifted)]
        for unit in shifted:
            self._switch(unit, giving.other)
        self.wanted = {Pool.PREFILL: decision.prefill, Pool.DECODE: decision.decode, None: decision.standbys}
        other = abs(sum(decision.pair) - sum(before))
        if not decision.shifted:
            other = abs(decision.prefill - before[0]) + abs(decision.decode - before[1])
        if shifted or other:
            self.story.moves.append((self.loop.now, len(shifted) + other))
        self._reconcile()

    def _reconcile(self) -> None:
        for pool in (Pool.PREFILL, Pool.DECODE, None):
            while self._count(pool) > self.wanted[pool]:
                self._remove(pool)
        for pool in (Pool.PREFILL, Pool.DECODE, None):
            while self._count(pool) < self.wanted[pool]:
                self._add(pool)
        self._place()

    def _count(self, pool: Pool | None) -> int:
        return sum(u.pool is pool and u.stage is not Stage.DRAINING for u in self.units)

    def _work_of(self, unit: Unit) -> float:
        engine = unit.fast.engine if unit.fast is not None else None
        return 0.0 if engine is None else engine.context_tokens + 4.0 * engine.backlog_tokens()

    def _remove(self, pool: Pool | None) -> None:
        """What has no place first, then what starts, then who has least to do."""
        units = [u for u in self.units if u.pool is pool and u.stage is not Stage.DRAINING]
        order = {Stage.UNSCHEDULABLE: 0, Stage.STARTING: 1, Stage.STANDBY: 2, Stage.READY: 3}
        unit = min(units, key=lambda u: (order[u.stage], self._work_of(u)))
        if unit.stage is not Stage.READY:
            self._gone(unit)
            return
        assert unit.fast is not None
        self._enter(unit, Stage.DRAINING)
        self.cluster.draining(unit.fast.key)

    def _add(self, pool: Pool | None) -> None:
        spare = [u for u in self.units if u.pool is None and u.stage in (Stage.STANDBY, Stage.STARTING)]
        if pool is not None and spare:
            unit = min(spare, key=lambda u: u.stage is Stage.STARTING)
            unit.pool = pool
            if unit.stage is Stage.STANDBY:
                self._enter(unit, Stage.STARTING)
                unit.timer = self.loop.at(self.loop.now + self.platform.wake_s, self._ready, unit)
            return
        self.units.append(Unit(pool, Stage.UNSCHEDULABLE, self.loop.now))

    def _place(self) -> None:
        """What waits for a place gets one, if there is any."""
        places = self.platform.places_at(self.loop.now)
        for unit in self.units:
            held = sum(u.held_from is not None for u in self.units)
            if unit.stage is Stage.UNSCHEDULABLE and held < places:
                self._enter(unit, Stage.STARTING)
                unit.held_from = self.loop.now
                jitter = self.chance.uniform(-1, 1) * self.platform.start_jitter
                unit.timer = self.loop.at(self.loop.now + self.platform.start_s * (1 + jitter), self._ready, unit)
        self.story.most_held = max(self.story.most_held, sum(u.held_from is not None for u in self.units))

    def _ready(self, unit: Unit) -> None:
        if not unit.started_in_s and unit.held_from is not None:
            unit.started_in_s = self.loop.now - unit.since
        self._enter(unit, Stage.READY if unit.pool is not None else Stage.STANDBY)
        if unit.pool is None:
            return
        role = _ROLES[unit.pool]
        pool = self.spec.prefill if role is Role.PREFILL else self.spec.decode
        worker = self._worker(f"{role.value[0]}{len(self.workers)}", role, pool)
        worker.engine.cache.block_tokens = self._block_tokens
        self.workers.append(worker)
        self._by_key[worker.key] = worker
        unit.fast = worker
        waiting, self._waiting = self._waiting, []
        for flight in waiting:
            self._dispatch(flight)

    def _switch(self, unit: Unit, pool: Pool) -> None:
        """Its running work goes on; what is sent to it from now on is of the other kind."""
        assert unit.fast is not None
        role = _ROLES[pool]
        unit.pool, unit.fast.role = pool, role
        unit.fast.engine.change_budget(
            (self.spec.prefill if role is Role.PREFILL else self.spec.decode).max_batch_tokens
        )
        self.cluster.said_role(unit.fast.key, role, self.cluster.workers[unit.fast.key].role_changes + 1)

    def _look(self, _: object) -> None:
        for unit in [u for u in self.units if u.stage is Stage.DRAINING]:
            assert unit.fast is not None
            if not unit.fast.flights:
                unit.fast.engine.alive = False
                self.cluster.forget(unit.fast.key)
                if self._count(None) < self.wanted[None]:
                    unit.pool, unit.fast = None, None
                    self._enter(unit, Stage.STANDBY)
                else:
                    self._gone(unit)
        self._reconcile()
        if self._going():
            self.loop.at(self.loop.now + _LOOK_S, self._look)

    def _die(self, pool: Pool) -> None:
        """The busiest of the role."""
        units = [u for u in self.units if u.pool is pool and u.stage is Stage.READY]
        if units:
            unit = max(units, key=self._work_of)
            assert unit.fast is not None
            index = unit.fast.engine.index
            self._gone(unit)
            self._crash(index)

    def _enter(self, unit: Unit, stage: Stage) -> None:
        unit.stage, unit.since = stage, self.loop.now

    def _gone(self, unit: Unit) -> None:
        if unit.timer is not None:
            unit.timer.cancel()
        self._let_go(unit)
        self.units.remove(unit)

    def _let_go(self, unit: Unit) -> None:
        if unit.held_from is not None:
            low, high = max(unit.held_from, self._window[0]), min(self.loop.now, self._window[1])
            self.story.gpu_s += max(0.0, high - low) * self.spec.gpus_per_worker
