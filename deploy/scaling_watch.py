"""What a running cluster says of itself, as observations for the scaling policy.

`diptych scaling` asks the routers, as `diptych status` does, and says what the policy would do. It changes nothing.

What comes and what is queued is known from counters: tokens computed (the steps' time for prompts, at the measured
rate) and how the backlog grew are the prompts that arrived; lengths are those of the requests seen last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.clients import ROLE_NAMES, STATE_NAMES
from deploy.config import ClusterConfig
from deploy.pools import Home
from scaling.observation import Observation, Pool, Stage, WorkerSeen

_STAGES = {"connecting": Stage.STARTING, "ready": Stage.READY, "draining": Stage.DRAINING}
_RUNNING = "running"
_LONG_S = 1e6


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a worker, as it is configured."""

    block_tokens: int
    max_sequences: int = 0  # that run at once; 0: not known


@dataclass(slots=True)
class Watcher:
    """`limits`: of workers, by their group; `others`: of those that are of none of them."""

    others: Limits
    limits: Mapping[Home, Limits] = field(default_factory=dict)
    _since: dict[tuple[str, int, str], float] = field(default_factory=dict)  # (worker, epoch, stage)
    _input_busy_s: dict[tuple[str, int], float] = field(default_factory=dict)
    _backlog: dict[tuple[str, int], int] = field(default_factory=dict)
    _looked_at: float | None = None
    _counted: dict[str, tuple[int, int]] = field(default_factory=dict)  # requests that came and ended, by router

    def look(self, clusters: Sequence[Any], now: float) -> Observation | None:
        """`clusters`: one Cluster message of each router. None the first time: nothing has passed yet."""
        workers = {(w.worker_id, w.epoch): w for c in clusters for w in c.workers if w.role in ROLE_NAMES}
        seen = []
        uncached = 0.0
        since = {}
        for key, w in workers.items():
            state = STATE_NAMES.get(w.state, "")
            if state not in _STAGES:
                continue
            role = ROLE_NAMES[w.role]
            stage = _STAGES[state]
            pool = Pool(role) if role in ("prefill", "decode") else None
            if pool is None and stage is Stage.READY:
                stage = Stage.STANDBY
            # Whoever was there at the first look has been there for long, as far as anybody knows.
            unseen = now if self._looked_at is not None else -_LONG_S
            entered = since[*key, stage.value] = self._since.get((*key, stage.value), unseen)
            seen.append(self._worker(w, pool, stage, now - entered))
            uncached += self._computed(key, w.load)
        self._since = since
        states = [c.router for c in clusters]
        live = sum(s.live_requests for s in states)
        came = went = 0
        for number, s in enumerate(states):
            name, arrived, ended = s.router_id or str(number), s.requests_total, s.requests_total - s.live_requests
            then, gone = self._counted.get(name, (arrived, ended))
            came, went = came + max(0, arrived - then), went + max(0, ended - gone)
            self._counted[name] = arrived, ended
        before, self._looked_at = self._looked_at, now
        if before is None:
            return None
        recent = [r for c in clusters for r in c.recent]
        prompts = [r.prompt_tokens for r in recent]
        answers = [r.completion_tokens for r in recent if r.outcome != _RUNNING]
        return Observation(
            now,
            now - before,
            tuple(seen),
            came,
            round(came * _mean(prompts)),
            round(max(0.0, uncached)),
            went,
            round(went * _mean(answers)),
            live_requests=live,
        )

    def _worker(self, w: Any, pool: Pool | None, stage: Stage, age_s: float) -> WorkerSeen:
        load = w.load
        own = self.limits.get(_started_as(w), self.others)
        return WorkerSeen(
            w.worker_id,
            pool,
            stage,
            age_s,
            backlog_tokens=load.prefill_backlog_tokens,
            # Of which lengths the backlog is made, a router does not say; one prompt of many is left out.
            longest_prompt_tokens=load.prefill_backlog_tokens // max(1, load.waiting_sequences),
            running_sequences=load.running_sequences,
            kv_tokens=load.context_tokens,
            waiting_kv_tokens=load.waiting_blocks * own.block_tokens,
            kv_capacity_tokens=load.total_blocks * own.block_tokens,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            step_constant_ms=load.step_constant_ms,
            step_per_sequence_ms=load.step_per_sequence_ms + load.step_per_token_ms,
            step_per_context_token_ms=load.step_per_context_token_ms,
            max_sequences=own.max_sequences,
        )

    def _computed(self, key: tuple[str, int], load: Any) -> float:
        """Prompt tokens that came to this worker since the last look."""
        busy_s = load.input_busy_s - self._input_busy_s.get(key, load.input_busy_s)
        grown = load.prefill_backlog_tokens - self._backlog.get(key, load.prefill_backlog_tokens)
        self._input_busy_s[key], self._backlog[key] = load.input_busy_s, load.prefill_backlog_tokens
        return max(0.0, busy_s) * load.prefill_tokens_per_s + grown


def watcher_of(config: ClusterConfig) -> Watcher:
    """Raises SettingsError, or ScalingError where no group is named that follows the load."""
    limits: dict[Home, Limits] = {}
    for group in config.groups:
        settings = config.settings_of(group)
        engine, called = settings.engine, settings.worker.group
        limits[_home(group.role, called)] = Limits(engine.block_tokens, engine.max_running_sequences)
    scaled = config.settings_of(config.scaled("decode")).engine
    return Watcher(Limits(scaled.block_tokens, scaled.max_running_sequences), limits)


def _started_as(w: Any) -> Home:
    """A worker's id begins with the role that it started with, unless somebody chose another; its group stays, too."""
    first = w.worker_id.partition("-")[0]
    return _home(first if first in ROLE_NAMES.values() else ROLE_NAMES[w.role], w.group)


def _home(role: str, group: str) -> Home:
    return f"{role}/{group}" if group else role


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
