"""One worker of the exact cluster: the real engine core, its steps timed by the cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from engine.step_cost import shape_of
from engine.types import StepPlan, StepResult
from router.dispatcher import Dispatcher
from router.placement.cluster import Role, WorkerInfo
from router.placement.policy import WorkerKey
from router.request import Finish, LegStart
from simulator.cost_model import CostModel, StepCost
from simulator.flights import BLOCK_TOKENS, Load
from simulator.learned import learned_steps, prompt_rate
from simulator.loop import EventLoop
from simulator.network import Nic
from simulator.spec import ClusterSpec, PoolSpec
from worker.rates import StepRates

VOCABULARY = 1 << 18
TOKEN = 7  # what every step samples


def step_ms(cost: StepCost, plan: StepPlan) -> float:
    """What the cost model says of a plan of the real scheduler."""
    shape = shape_of(plan.items)
    return cost.ms(shape.sequences, shape.tokens, shape.context_tokens, shape.attention_pairs)


@dataclass(slots=True, eq=False)
class Leg:
    start: LegStart
    worker: ExactWorker

    @property
    def number(self) -> int:
        return self.start.leg

    @property
    def known_tokens(self) -> int:
        return len(self.start.request.prompt) + len(self.start.emitted)


class ExactWorker:
    """The step loop of worker/loop.py in virtual time: schedule, the step's time, commit, and on.

    Of legs that hand over it says `on_progress(leg, computed_tokens)` after each step, then `on_handed_over(leg)`.
    """

    def __init__(
        self,
        key: WorkerKey,
        role: Role,
        pool: PoolSpec,
        spec: ClusterSpec,
        costs: CostModel,
        loop: EventLoop,
        dispatcher: Dispatcher,
        on_progress: Callable[[Leg, int], None],
        on_handed_over: Callable[[Leg], None],
    ) -> None:
        self.key, self.role, self._costs, self._loop, self._dispatcher = key, role, costs, loop, dispatcher
        self._on_progress, self._on_handed_over = on_progress, on_handed_over
        blocks = (spec.kv_capacity_tokens or costs.kv_capacity_tokens) // BLOCK_TOKENS
        limits = EngineLimits(
            BLOCK_TOKENS,
            pool.max_batch_tokens,
            min(pool.max_running_sequences, pool.max_batch_tokens),
            1 << 20,
            1 << 20,
            VOCABULARY,
            spec.itl_target_ms if pool.adaptive_chunks else None,
        )
        learned = learned_steps(costs.step, pool.max_batch_tokens, decodes=role is Role.DECODE)
        self.core = EngineCore(limits, BlockPool(blocks), "simulated", learned)
        self.nic = Nic(spec.nic_gbytes_per_s * 1e9)
        self.legs: dict[int, Leg] = {}
        self.alive = True
        self.busy_s = 0.0
        self.rates = StepRates()
        self.rates.prefill_tokens_per_s = prompt_rate(costs.step, pool.max_batch_tokens)
        self.pull_bytes_per_s = 0.0
        self.said: Load | None = None
        self._stepping = False
        self.block_events = 0
        self.newest_leg = 0

    @property
    def info(self) -> WorkerInfo:
        bytes_per_block = BLOCK_TOKENS * self._costs.kv_bytes_per_token
        return WorkerInfo(
            self.key, self.role, self.key.worker_id, "simulated", "simulated", BLOCK_TOKENS, bytes_per_block,
            self.core.pool.num_blocks, 1 << 20, VOCABULARY,
        )  # fmt: skip

    def turn(self) -> None:
        if self._stepping or not self.alive:
            return
        plan = self.core.schedule(self._loop.now)
        if plan is None:
            return
        self._stepping = True
        ms = step_ms(self._costs.step, plan)
        self.busy_s += ms / 1e3
        self._loop.at(self._loop.now + ms / 1e3, self._commit, (plan, ms))

    def _commit(self, what: tuple[StepPlan, float]) -> None:
        plan, ms = what
        self._stepping = False
        self.rates.observe(plan, ms / 1e3)
        if not self.alive:
            return
        dispatcher, now = self._dispatcher, self._loop.now
        sampled = tuple(TOKEN if item.sample else None for item in plan.items)
        events = self.core.commit(plan, StepResult(sampled, (None,) * len(sampled)), now)
        for progress in events.progress:
            leg = self.legs.get(progress.sequence_id)
            if leg is not None and leg.start.serve_handoff_id:
                self._on_progress(leg, progress.num_computed_tokens)
        if events.tokens:
            dispatcher.on_tokens(
                [t.sequence_id for t in events.tokens],
                [t.position for t in events.tokens],
                [t.token_id for t in events.tokens],
                {},
            )
        for end in events.ends:
            leg = self.legs.get(end.sequence_id)
            if leg is None:
                continue
            if end.reason is None:
                self._on_handed_over(leg)
                dispatcher.on_end(leg.number, None, end.cached_tokens)
                continue
            del self.legs[leg.number]
            if leg.start.serve_handoff_id:  # retained, and nobody will read it
                self.core.drop(leg.number)
            dispatcher.on_end(leg.number, Finish(end.reason.value), end.cached_tokens)
        dispatcher.flush()
        self.turn()

    def load(self) -> Load:
        load, cost = self.core.load(), self.core.step_cost.cost()
        return Load(
            load.running_sequences,
            load.waiting_sequences,
            load.prefill_backlog_tokens,
            load.context_tokens,
            load.total_blocks,
            load.free_blocks,
            load.cached_blocks,
            self.rates.step_ms,
            self.rates.prefill_tokens_per_s,
            self.rates.decode_tokens_per_s,
            self.pull_bytes_per_s,
            self.rates.decode_ms_now(load.decode_ms),
            load.chunk_tokens,
            load.waiting_blocks,
            self.newest_leg,
            cost.constant_ms,
            cost.per_sequence_ms,
            cost.per_token_ms,
            cost.per_context_token_ms,
            cost.per_attention_pair_ms,
            self.core.step_cost.relative_error,
        )
