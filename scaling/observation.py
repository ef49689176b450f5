"""What a scaling decision is given: both pools as they are seen at one moment, and what came since the last one."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Pool(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Pool:
        return Pool.DECODE if self is Pool.PREFILL else Pool.PREFILL


class Stage(enum.StrEnum):
    """Of a worker's life, as far as its number matters. All of them hold their devices but UNSCHEDULABLE, which is
    counted as if it did: it may get them at any moment."""

    STARTING = "starting"
    UNSCHEDULABLE = "unschedulable"  # asked for, and there is no place for it
    READY = "ready"
    STANDBY = "standby"  # weights are loaded, nothing is sent there
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """Measured values are 0 where nothing has been measured yet."""

    worker_id: str
    pool: Pool | None  # None: a standby
    stage: Stage
    age_s: float  # in this stage
    started_in_s: float = 0.0  # how long its start took
    backlog_tokens: int = 0  # of prompts accepted and not computed
    longest_prompt_tokens: int = 0  # of one prompt in the backlog: no other worker can shorten that
    running_sequences: int = 0
    kv_tokens: int = 0  # contexts of what runs
    waiting_kv_tokens: int = 0  # what sequences need that wait for room
    kv_capacity_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    step_constant_ms: float = 0.0
    step_per_sequence_ms: float = 0.0
    step_per_context_token_ms: float = 0.0
    tokens_per_step: float = 1.0  # of one sequence: more with drafts
    max_sequences: int = 0  # that may run at once; 0: as many as fit


@dataclass(frozen=True, slots=True)
class Observation:
    """Counts cover the last `covers_s`. `*_target` are what the platform was told last, by whomever; None: unknown."""

    now: float
    covers_s: float
    workers: tuple[WorkerSeen, ...]
    arrived_requests: int = 0
    arrived_prompt_tokens: int = 0
    arrived_uncached_tokens: int = 0  # of these, what no cache had
    ended_requests: int = 0
    ended_answer_tokens: int = 0
    queued_requests: int = 0  # at the routers, with no worker
    queued_tokens: int = 0
    longest_queued_tokens: int = 0
    live_requests: int = 0  # everywhere
    prefill_target: int | None = None
    decode_target: int | None = None

    def of(self, pool: Pool | None, *stages: Stage) -> list[WorkerSeen]:
        return [w for w in self.workers if w.pool is pool and w.stage in stages]

    def count(self, pool: Pool | None, *stages: Stage) -> int:
        return len(self.of(pool, *stages))
