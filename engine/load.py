"""What an engine has to do and has room for, in numbers."""

from __future__ import annotations

from collections.abc import Collection

from engine.chunk_budget import ChunkBudget
from engine.kv_groups import KvGroups
from engine.scheduler import EngineLimits, Scheduler
from engine.sequence import Sequence, Status
from engine.step_cost import StepCostEstimate
from engine.types import EngineLoad

TRUSTED_ERROR = 0.4  # relative, of the learned step costs: beyond, what was measured last is the better guess


def engine_load(
    scheduler: Scheduler,
    groups: KvGroups,
    sequences: Collection[Sequence],
    limits: EngineLimits,
    chunk_budget: ChunkBudget,
    cost: StepCostEstimate,
    held: int,
    tokens_total: int,
) -> EngineLoad:
    running, waiting, pool = scheduler.running, scheduler.waiting, groups.pool
    decodes = [s for s in running if s.uncomputed == 1]
    put_back = [s for s in (*running, *waiting) if s.put_back]
    context_tokens = sum(s.num_computed for s in decodes)
    allowance = chunk_budget.allowance(len(decodes), context_tokens)
    count = max(1, len(decodes))
    learned = cost.steps and cost.relative_error < TRUSTED_ERROR
    return EngineLoad(
        running_sequences=len(running),
        waiting_sequences=len(waiting),
        held_sequences=held,
        prefill_backlog_tokens=sum(s.uncomputed for s in waiting)
        + sum(s.uncomputed for s in running if s.uncomputed > 1),
        context_tokens=sum(s.num_computed for s in running),
        total_blocks=pool.num_blocks,
        free_blocks=pool.free_blocks,
        cached_blocks=pool.cached_blocks,
        preemptions_total=scheduler.preemptions_total,
        tokens_total=tokens_total,
        chunk_tokens=max(1, min(limits.max_batch_tokens, allowance.tokens(0))),
        waiting_blocks=sum(
            groups.first_blocks(len(s.tokens)) + (s.search.blocks if s.search is not None else 0)
            for s in sequences
            if not any(s.tables) and s.status is not Status.FINISHED
        ),
        decode_ms=cost.cost().ms(count, count, context_tokens + count, 0) if learned else 0.0,
        put_back_sequences=len(put_back),
        put_back_tokens=sum(s.uncomputed for s in put_back),
        blocks_in_use=pool.blocks_in_use,
    )
