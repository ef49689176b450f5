"""A worker's numbers as the catalog's metrics. Read on a scraper's thread, from what the engine thread leaves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

from settings.telemetry.instruments import Reader, by, plain
from worker.core import WorkerCore

_BLOCK_STATES = ("total", "free", "cached", "leased", "quarantined")


def readers(
    core: WorkerCore, health: Callable[[], Mapping[str, float]], expiries: Callable[[], Mapping[str, float]]
) -> dict[str, Reader]:
    """What both roles have. `health`: the watchdog's word on each part; `expiries`: of certificates."""
    counts = core.counts
    token_type = "gen_ai.token.type"
    return {
        "diptych.sequences": by(
            "state",
            lambda: {
                "running": core.last_load.running_sequences,
                "waiting": core.last_load.waiting_sequences,
                "put_back": core.last_load.put_back_sequences,
            },
        ),
        "diptych.prefill.backlog": plain(lambda: core.last_load.prefill_backlog_tokens),
        "diptych.busy": by(token_type, lambda: {"input": counts.input_busy_s, "output": counts.output_busy_s}),
        "diptych.tokens.computed": by(
            token_type, lambda: {"input": counts.input_tokens, "output": counts.output_tokens}
        ),
        "diptych.cache.hit": plain(lambda: core.last_load.cached_tokens_total),
        "diptych.prefix.pulls": by(
            "outcome",
            lambda: {
                "pulled": core.last_load.prefix_pulls_total,
                "failed": core.last_load.prefix_pull_failures_total,
            },
        ),
        "diptych.verifications": plain(lambda: core.last_load.verifications_total),
        "diptych.drafts": by(
            "outcome",
            lambda: {
                "accepted": core.last_load.drafts_accepted_total,
                "rejected": core.last_load.drafts_total - core.last_load.drafts_accepted_total,
            },
        ),
        "diptych.preemptions": plain(lambda: core.last_load.preemptions_total),
        "diptych.kv.blocks": by(
            "state", lambda: {state: getattr(core.last_load, f"{state}_blocks") for state in _BLOCK_STATES}
        ),
        "diptych.watchdog.health": by("part", health),
        "diptych.certificate.expiry": by("listener", expiries),
    }


class ExpertLoad(Protocol):
    """engine/experts/load.py"""

    def routed(self) -> int: ...

    def imbalance(self, now: float) -> float: ...

    def by_group(self) -> Mapping[str, int]: ...


def expert_readers(load: ExpertLoad | None) -> dict[str, Reader]:
    """Nothing is counted where a model has no experts."""
    return {
        "diptych.experts.tokens": lambda: [] if load is None else [(load.routed(), {})],
        "diptych.experts.group.tokens": by("group", lambda: {} if load is None else load.by_group()),
        "diptych.experts.imbalance": lambda: [] if load is None else [(load.imbalance(time.monotonic()), {})],
    }


def adapter_readers(
    held: Callable[[], Mapping[str, float]], loads: Callable[[], Mapping[str, int]], core: WorkerCore
) -> dict[str, Reader]:
    """Nothing is counted where there are no adapters."""

    def there(values: Callable[[], Mapping[str, float]]) -> Callable[[], Mapping[str, float]]:
        return lambda: {} if core.adapters is None else values()

    return {
        "diptych.adapters": by("state", there(held)),
        "diptych.adapter.loads": by("outcome", there(loads)),
        "diptych.adapter.slots.filled": lambda: [] if core.adapters is None else [(core.adapters.loads_total, {})],
        "diptych.adapter.slot.time": lambda: [] if core.adapters is None else [(core.adapter_load_ms() / 1e3, {})],
    }


def prefill_readers(active_leases: Callable[[], int], outcomes: Callable[[], Mapping[str, int]]) -> dict[str, Reader]:
    return {
        "diptych.leases.active": plain(active_leases),
        "diptych.leases": by("outcome", outcomes),
    }


def decode_readers(
    core: WorkerCore, outcomes: Callable[[], Mapping[str, int]], pulled_bytes: Callable[[], int]
) -> dict[str, Reader]:
    def paths() -> Mapping[str, int]:
        return Counter(path.state.name.lower() for path in core.last_load.paths)

    return {
        "diptych.handoffs": by("outcome", outcomes),
        "diptych.transfer.io": plain(pulled_bytes),
        "diptych.paths": by("state", paths),
    }
