"""What a running cluster says of itself, as observations for the scaling policy; and its decisions in plain words.

`diptych scaling` asks the routers, as `diptych status` does, and says what the policy would do. It changes nothing.

What comes and what is queued is known from counters: tokens computed (the steps' time for prompts, at the measured
rate) and how the backlog grew are the prompts that arrived; lengths are those of the requests seen last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.clients import ROLE_NAMES, STATE_NAMES
from scaling.decision import Decision
from scaling.observation import Observation, Pool, Stage, WorkerSeen

_STAGES = {"connecting": Stage.STARTING, "ready": Stage.READY, "draining": Stage.DRAINING}
_RUNNING = "running"
_LONG_S = 1e6


@dataclass(slots=True)
class Watcher:
    """`block_tokens` and `max_sequences` (of a decode worker) are the cluster's settings."""

    block_tokens: int
    max_sequences: int = 0
    _since: dict[tuple[str, int, str], float] = field(default_factory=dict)  # (worker, epoch, stage)
    _input_busy_s: dict[tuple[str, int], float] = field(default_factory=dict)
    _backlog: dict[tuple[str, int], int] = field(default_factory=dict)
    _looked_at: float | None = None
    _arrived: int = 0
    _ended: int = 0

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
        arrived = sum(s.requests_total for s in states)
        live = sum(s.live_requests for s in states)
        ended = arrived - live
        before, self._looked_at = self._looked_at, now
        came, went = max(0, arrived - self._arrived), max(0, ended - self._ended)
        self._arrived, self._ended = arrived, ended
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
            waiting_kv_tokens=load.waiting_blocks * self.block_tokens,
            kv_capacity_tokens=load.total_blocks * self.block_tokens,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            step_constant_ms=load.step_constant_ms,
            step_per_sequence_ms=load.step_per_sequence_ms + load.step_per_token_ms,
            step_per_context_token_ms=load.step_per_context_token_ms,
            max_sequences=self.max_sequences,
        )

    def _computed(self, key: tuple[str, int], load: Any) -> float:
        """Prompt tokens that came to this worker since the last look."""
        busy_s = load.input_busy_s - self._input_busy_s.get(key, load.input_busy_s)
        grown = load.prefill_backlog_tokens - self._backlog.get(key, load.prefill_backlog_tokens)
        self._input_busy_s[key], self._backlog[key] = load.input_busy_s, load.prefill_backlog_tokens
        return max(0.0, busy_s) * load.prefill_tokens_per_s + grown


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


# In words.

_SHOWN = (
    ("uncached_tokens_per_s", "prompt tokens/s not cached", "{:,.0f}"),
    ("uncached_tokens_per_s_ahead", "the same, ahead", "{:,.0f}"),
    ("backlog_tokens", "backlog that more workers would shorten, tokens", "{:,.0f}"),
    ("prefill_tokens_per_s_each", "prompt tokens/s of one worker", "{:,.0f}"),
    ("requests_per_s", "requests/s", "{:.2f}"),
    ("resident_kv_tokens", "resident KV, tokens", "{:,.0f}"),
    ("kv_tokens_each", "KV that one worker holds within the target, tokens", "{:,.0f}"),
    ("step_ms", "its step then, ms", "{:.1f}"),
    ("answer_tokens", "mean answer, tokens", "{:.0f}"),
    ("prefill_load_ahead", "load of prompts ahead, workers", "{:.2f}"),
    ("decode_load_ahead", "load of answers ahead, workers", "{:.2f}"),
    ("prefill_spare", "spare for chance, prompts", "{:.2f}"),
    ("decode_spare", "spare for chance, answers", "{:.2f}"),
    ("ahead_s", "looked ahead, s", "{:.0f}"),
    ("held_gpus", "GPUs held", "{:g}"),
    ("budget_gpus", "budget, GPUs", "{:g}"),
)


def line(decision: Decision) -> str:
    """One decision, short."""
    moves = ", ".join(
        f"{count} {what}"
        for count, what in (
            (abs(decision.shifted), "to prefill" if decision.shifted > 0 else "to decode"),
            (decision.woken, "woken"),
            (decision.started, "started"),
            (decision.stopped, "stopped"),
            (decision.withdrawn, "withdrawn"),
        )
        if count
    )
    would = "would be " if decision.dry_run else ""
    return f"{decision.prefill} prefill, {decision.decode} decode ({decision.rule}): {decision.why}" + (
        f"; {would}{moves}" if moves else ""
    )


def render(decision: Decision) -> str:
    """One decision with its numbers and what was weighed against it."""
    lines = [line(decision)]
    for name, words, form in _SHOWN:
        if name in decision.numbers:
            lines.append(f"  {form.format(decision.numbers[name]):>12}  {words}")
    if decision.alternatives:
        lines.append("  weighed (load over capacity, above 1 is short)")
    for a in decision.alternatives:
        lines.append(
            f"    {a.prefill} + {a.decode}  prompts {a.prefill_strain:.2f}, answers {a.decode_strain:.2f}  "
            f"{a.what} in {a.takes_s:.0f} s: {a.verdict}"
        )
    return "\n".join(lines)


def to_dict(decision: Decision) -> dict[str, Any]:
    return {
        "prefill": decision.prefill,
        "decode": decision.decode,
        "standbys": decision.standbys,
        "rule": decision.rule,
        "why": decision.why,
        "shifted": decision.shifted,
        "woken": decision.woken,
        "started": decision.started,
        "stopped": decision.stopped,
        "withdrawn": decision.withdrawn,
        "dry_run": decision.dry_run,
        "numbers": dict(decision.numbers),
        "alternatives": [
            {
                "prefill": a.prefill,
                "decode": a.decode,
                "prefill_strain": a.prefill_strain,
                "decode_strain": a.decode_strain,
                "what": a.what,
                "takes_s": a.takes_s,
                "verdict": a.verdict,
            }
            for a in decision.alternatives
        ],
    }
