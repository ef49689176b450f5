"""What the fast cluster keeps: a request under way, a worker with its queue of handoffs, what it reported last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.placement.cluster import Role
from router.placement.policy import PolicyParams, WorkerKey
from simulator.jobs import Job
from simulator.leap_worker import LeapWorker
from simulator.network import Nic
from simulator.outcome import Outcome
from simulator.spec import ClusterSpec
from simulator.traces import TraceRequest

BLOCK_TOKENS = 64  # of the workers; caches and index work on the trace's blocks
REPORT_SLOTS = 16  # workers report in turns
MAX_TOKENS = 1 << 14  # what clients ask for: how long an answer will be, only the trace knows


@dataclass(slots=True)
class Load:
    """What a worker reports; fields as WorkerLoad in cluster.proto."""

    running_sequences: int = 0
    waiting_sequences: int = 0
    prefill_backlog_tokens: int = 0
    context_tokens: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    step_ms: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    pull_bytes_per_s: float = 0.0
    decode_step_ms: float = 0.0
    chunk_tokens: int = 0
    waiting_blocks: int = 0
    last_sequence_id: int = 0
    step_constant_ms: float = 0.0
    step_per_sequence_ms: float = 0.0
    step_per_token_ms: float = 0.0
    step_per_context_token_ms: float = 0.0
    step_per_attention_pair_ms: float = 0.0
    step_cost_error: float = 1.0


@dataclass(slots=True, eq=False)
class Flight:
    """A request under way."""

    request: TraceRequest
    outcome: Outcome
    names: Sequence[int]
    decode: FastWorker | None = None
    prefill: FastWorker | None = None
    decode_leg: int = 0
    prefill_leg: int = 0
    decode_job: Job | None = None
    prefill_job: Job | None = None
    first_chunk_s: float = -1.0
    moved_tokens: int = 0  # computed on P so far, cached ones included
    sent_tokens: int = 0
    reserved: bool = False
    arrives_s: float = math.inf
    all_sent: bool = False
    estimates: Mapping[str, float] = field(default_factory=dict)
    learned: bool = False
    exclude: frozenset[WorkerKey] = frozenset()


@dataclass(slots=True, eq=False)
class FastWorker:
    key: WorkerKey
    role: Role
    engine: LeapWorker
    nic: Nic
    flights: dict[int, Flight] = field(default_factory=dict)  # by number
    no_room: list[Flight] = field(default_factory=list)
    held_tokens: int = 0  # of sequences that are to be received and have no room yet
    newest_leg: int = 0
    said: Load | None = None
    pull_bytes_per_s: float = 0.0


@dataclass(slots=True)
class Sample:
    """Of the pools, for the report."""

    at_s: float
    prefill_busy: float
    decode_busy: float
    running: int
    waiting_tokens: int
    kv_share: float


def policy_params(spec: ClusterSpec, other: Mapping[str, float | bool]) -> PolicyParams:
    return PolicyParams(
        itl_target_ms=spec.itl_target_ms,
        ttft_target_ms=spec.ttft_base_s * 1e3,
        ttft_target_stretch=spec.ttft_isolated_factor,
        due_dates=spec.overload == "put_back",
        overload_protect=spec.overload_protect,
        **other,  # type: ignore[arg-type]
    )


def runs(stored: Mapping[int, int]) -> list[tuple[int, list[int]]]:
    """(parent, names that follow it and one another), as block events have it."""
    found: list[tuple[int, list[int]]] = []
    last = -1
    for name, parent in stored.items():
        if parent == last:
            found[-1][1].append(name)
        else:
            found.append((parent, [name]))
        last = name
    return found


def present(value: Any) -> Any:
    assert value is not None
    return value
