"""Scaling decisions in plain words, and as JSON. `decision` is a ScalingDecision message."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import Any

from deploy.clients import SCALING_OUTCOMES

_WIDEST = 100
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
    ("peak_prefill_load", "prompts of the peak that is kept, workers", "{:.2f}"),
    ("peak_decode_load", "its answers, workers", "{:.2f}"),
    ("peak_kept_s", "kept for, s", "{:.0f}"),
    ("ahead_s", "looked ahead, s", "{:.0f}"),
    ("start_s", "time that a start takes, s", "{:.0f}"),
    ("starting", "workers that are starting", "{:.0f}"),
    ("draining", "workers that drain", "{:.0f}"),
    ("unschedulable", "workers that find no place", "{:.0f}"),
    ("held_gpus", "GPUs held", "{:g}"),
    ("budget_gpus", "budget, GPUs", "{:g}"),
)


def line(decision: Any) -> str:
    """One decision, short."""
    after, moves = decision.after, _moves(decision)
    would = "would be " if _outcome(decision) == "dry run" else ""
    return f"{after.prefill} prefill, {after.decode} decode ({decision.rule}): {decision.reason}" + (
        f"; {would}{moves}" if moves else ""
    )


def _outcome(decision: Any) -> str:
    return SCALING_OUTCOMES.get(decision.outcome, "?")


def _moves(decision: Any) -> str:
    return ", ".join(
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


def details(decision: Any) -> list[str]:
    """The numbers of a decision and what was weighed against it."""
    lines = []
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
    return lines


def render_one(decision: Any) -> str:
    return "\n".join([line(decision), *details(decision)])


def render(told: Any, last: int, width: int, wall_now: float | None = None) -> str:
    """`told`: GetScalingResponse. The current decision in full, then what was decided before, newest first."""
    now = time.time() if wall_now is None else wall_now
    current = told.current
    after, ready, numbers = current.after, current.ready, current.numbers
    standby = f", {ready.standby} standing by" if ready.standby else ""
    gpus = f"; {numbers['held_gpus']:g} of {numbers['budget_gpus']:g} GPUs held" if "budget_gpus" in numbers else ""
    width = min(width, _WIDEST)
    lines = [
        f"{after.prefill} prefill and {after.decode} decode workers are wanted, {ready.prefill} and {ready.decode} "
        f"were ready{standby}{gpus}",
        f"decided by {current.decider}, every {current.interval_s:g} s; last {_ago(current.age_ms)}",
        "",
        *_entry([current], now),
        *details(current),
    ]
    groups = [g for g in _alike(told.decisions) if not _same(g[0], current)]
    if groups:
        lines += ["", "before" if len(groups) <= last else f"before, the last {last} (--last for more)"]
    for group in groups[:last]:
        lines += _entry(group, now)
    return "\n".join(folded for one in lines for folded in _fold(one, width))


def _same(a: Any, b: Any) -> bool:
    return (a.decider, a.number) == (b.decider, b.number)


def _alike(decisions: Sequence[Any]) -> Iterator[list[Any]]:
    """Neighbours that say the same."""
    group: list[Any] = []
    for one in decisions:
        if group and _said(group[0]) != _said(one):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _said(d: Any) -> tuple[Any, ...]:
    return d.decider, d.rule, d.outcome, d.error, d.before.prefill, d.before.decode, d.after.prefill, d.after.decode


def _entry(group: Sequence[Any], now: float) -> list[str]:
    """Decisions that say the same, newest first."""
    newest, oldest = group[0], group[-1]
    before, after = newest.before, newest.after
    pair = f"{after.prefill} + {after.decode}"
    if (before.prefill, before.decode) != (after.prefill, after.decode):
        pair = f"{before.prefill} + {before.decode} → {pair}"
    outcome = "" if _outcome(newest) == "unchanged" else f", {_outcome(newest)}"
    often = "" if len(group) == 1 else f", {len(group)} times since {_clock(now, oldest.age_ms)}"
    lines = [f"{_clock(now, newest.age_ms)}  {pair:<14} {newest.rule}{outcome}{often}", f"          {newest.reason}"]
    if newest.error:
        lines.append(f"          error: {newest.error}")
    return lines


def _clock(now: float, age_ms: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(now - age_ms / 1e3))


def _ago(age_ms: float) -> str:
    s = age_ms / 1e3
    return f"{s:.0f} s ago" if s < 120 else f"{s / 60:.0f} min ago" if s < 7200 else f"{s / 3600:.0f} h ago"


def _fold(text: str, width: int) -> list[str]:
    indent = len(text) - len(text.lstrip())
    return textwrap.wrap(text, width, subsequent_indent=" " * (indent or 2), break_on_hyphens=False) or [""]


def to_dict(decision: Any) -> dict[str, Any]:
    return {
        "decider": decision.decider,
        "number": decision.number,
        "age_s": decision.age_ms / 1e3,
        "interval_s": decision.interval_s,
        "prefill": decision.after.prefill,
        "decode": decision.after.decode,
        "standbys": decision.after.standby,
        "before": _counts(decision.before),
        "ready": _counts(decision.ready),
        "rule": decision.rule,
        "why": decision.reason,
        "shifted": decision.shifted,
        "woken": decision.woken,
        "started": decision.started,
        "stopped": decision.stopped,
        "withdrawn": decision.withdrawn,
        "outcome": _outcome(decision),
        "dry_run": _outcome(decision) == "dry run",
        "error": decision.error,
        "numbers": dict(decision.numbers),
        "alternatives": [
            {
                "prefill": a.prefill,
                "decode": a.decode,
                "prefill_strain": _finite(a.prefill_strain),
                "decode_strain": _finite(a.decode_strain),
                "what": a.what,
                "takes_s": a.takes_s,
                "verdict": a.verdict,
            }
            for a in decision.alternatives
        ],
    }


def all_to_dict(told: Any, last: int) -> dict[str, Any]:
    return {
        "current": to_dict(told.current) if told.HasField("current") else None,
        "decisions": [to_dict(d) for d in told.decisions[:last]],
        "points": [
            {"age_s": p.age_ms / 1e3, "wanted": _counts(p.wanted), "ready": _counts(p.ready), "held_gpus": p.held_gpus}
            for p in told.points
        ],
        "decisions_total": told.decisions_total,
        "errors_total": told.errors_total,
    }


def _counts(counts: Any) -> dict[str, int]:
    return {"prefill": counts.prefill, "decode": counts.decode, "standby": counts.standby}


def _finite(value: float) -> float | None:
    """JSON knows no infinity: a pool without workers is strained without bound."""
    return value if math.isfinite(value) else None
