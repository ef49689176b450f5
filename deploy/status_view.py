"""`diptych status`: the pools as tables and bars, from one Cluster message."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.clients import PLACEMENTS, ROLE_NAMES, STATE_NAMES

_BAR = 12
_STATE_STYLES = {"ready": "green", "draining": "yellow", "connecting": "yellow", "lost": "red"}


def render(cluster: Any, recent: int = 8) -> RenderableType:
    return Group(_router_line(cluster.router), _workers(cluster.workers), _recent(cluster.recent[:recent]))


def _router_line(router: Any) -> Text:
    state = ("serving", "green") if router.serving else (f"not serving: {router.not_serving_reason}", "red")
    return Text.assemble(
        ("router ", "bold"),
        f"{router.router_id}  {router.model}  ",
        state,
        f"  live {router.live_requests}  requests {router.requests_total}  errors {router.errors_total}"
        f"  tokens {router.tokens_total}  up {router.uptime_s:.0f} s",
    )


def _workers(workers: Any) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (
        ("pool", "left"),
        ("worker", "left"),
        ("state", "left"),
        ("running", "right"),
        ("waiting", "right"),
        ("backlog", "right"),
        ("KV in use", "left"),
        ("cached", "right"),
        ("leased", "right"),
        ("quarantined", "right"),
        ("step ms", "right"),
        ("prefill tok/s", "right"),
        ("decode tok/s", "right"),
        ("device · attention · transport", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for w in sorted(workers, key=lambda w: (-w.role, w.worker_id)):
        load, state = w.load, STATE_NAMES.get(w.state, "?")
        table.add_row(
            ROLE_NAMES.get(w.role, "?"),
            w.worker_id,
            Text(state, style=_STATE_STYLES.get(state, "")),
            str(load.running_sequences),
            str(load.waiting_sequences),
            f"{load.prefill_backlog_tokens} tok",
            _bar(load.total_blocks - load.free_blocks, load.total_blocks),
            str(load.cached_blocks),
            str(load.leased_blocks),
            str(load.quarantined_blocks),
            f"{load.step_ms:.1f}",
            f"{load.prefill_tokens_per_s:.0f}",
            f"{load.decode_tokens_per_s:.0f}",
            f"{w.device} · {w.attention_backend} · {w.transport}",
        )
    if not workers:
        table.add_row("", "no worker has registered")
    return table


def _bar(used: int, total: int) -> Text:
    share = used / total if total else 0.0
    full = round(share * _BAR)
    style = "red" if share > 0.9 else "yellow" if share > 0.7 else "green"
    return Text.assemble(("█" * full, style), ("░" * (_BAR - full), "dim"), f" {used}/{total}")


def _recent(recent: Any) -> Table:
    table = Table(title="recent requests", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("request", "route", "why", "prompt", "tokens", "TTFT ms", "gap ms", "total ms", "outcome"):
        table.add_column(column, justify="right" if column in ("prompt", "tokens") or "ms" in column else "left")
    for r in recent:
        split = r.route.placement == PLACEMENTS["split"]
        route = f"{r.route.prefill_worker} → {r.route.decode_worker}" if split else r.route.decode_worker
        table.add_row(
            r.request_id[:20],
            route,
            r.route.rule,
            str(r.prompt_tokens),
            str(r.completion_tokens),
            f"{r.timings.ttft_ms:.0f}",
            f"{r.timings.handoff_gap_ms:.0f}" if split else "",
            f"{r.timings.total_ms:.0f}",
            Text(r.outcome, style="" if r.outcome in ("stop", "length", "running", "cancelled") else "red"),
        )
    return table
