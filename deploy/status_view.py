"""`diptych status`: the pools as tables and bars, from one Cluster message."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.clients import PATH_BROKEN, PLACEMENTS, ROLE_NAMES, STATE_NAMES

_BAR = 6
_LEFT = ("role", "group", "worker", "state", "KV in use", "request", "route", "why", "outcome")
_STATE_STYLES = {"ready": "green", "draining": "yellow", "connecting": "yellow", "lost": "red"}


_NO_CLAIM = (
    "answers that workers of several schemes computed are not token-identical to those of any one engine; "
    "`diptych explain` names the schemes"
)
_WIDE = 110  # characters; below, the columns that say most


def render(cluster: Any, recent: int = 8, width: int = _WIDE) -> RenderableType:
    wide = width >= _WIDE
    parts = [_router_line(cluster.router), _workers(cluster.workers, wide)]
    if cluster.migrations:
        parts.append(_migrations(cluster.migrations[:recent]))
    return Group(*parts, _recent(cluster.recent[:recent], wide))


def render_listeners(cluster: Any) -> RenderableType:
    """Every socket on which a process of the cluster accepts connections, as the processes find them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("process", "address", "protocol", "authentication", "encrypted"):
        table.add_column(column, no_wrap=True)
    router = cluster.router
    for process, found in (
        (f"router {router.router_id}", router.listeners),
        *((w.worker_id, w.listeners) for w in cluster.workers),
    ):
        for one in found:
            open_to_all = one.authentication == "none" and not one.address.startswith(("127.", "[::1]"))
            style = "red" if open_to_all or one.protocol == "unknown" else ""
            table.add_row(
                process, one.address, one.protocol, one.authentication, "yes" if one.encrypted else "no", style=style
            )
    return table


def _router_line(router: Any) -> Text:
    state = ("serving", "green") if router.serving else (f"not serving: {router.not_serving_reason}", "red")
    return Text.assemble(
        ("router ", "bold"),
        f"{router.router_id}  {router.model}  ",
        state,
        f"  live {router.live_requests}  requests {router.requests_total}  errors {router.errors_total}"
        f"  recoveries {router.recoveries_total}  tokens {router.tokens_total}  up {router.uptime_s:.0f} s",
        f"\nother routers: {', '.join(router.other_routers)}" if router.other_routers else "",
        (f"\nmixed quantization: {_NO_CLAIM}", "yellow") if router.mixed_quantization else "",
    )


def _table(columns: dict[str, bool], wide: bool, **options: Any) -> Table:
    """`columns`: whether each is left out where there is little room."""
    table = Table(box=None, pad_edge=False, header_style="bold", **options)
    for name, dispensable in columns.items():
        if wide or not dispensable:
            table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    return table


def _add(table: Table, cells: dict[str, str | Text]) -> None:
    table.add_row(*(cells[str(column.header)] for column in table.columns))


def _workers(workers: Any, wide: bool) -> RenderableType:
    if not len(workers):
        return Text("no worker has registered")
    columns = {"role": True} | ({"group": True} if any(w.group for w in workers) else {})
    columns |= {"worker": False, "state": False, "run": False, "wait": False, "backlog": True}
    columns |= {"KV in use": False, "cached": True, "leased": True, "step ms": False, "tok/s": False}
    table = _table(columns, wide)
    details = Text()
    for w in sorted(workers, key=lambda w: (w.role, w.group, w.worker_id)):
        load, state, role = w.load, STATE_NAMES.get(w.state, "?"), ROLE_NAMES.get(w.role, "?")
        quarantined = f" +{load.quarantined_blocks} quarantined" if load.quarantined_blocks else ""
        for path in load.paths:
            if path.state == PATH_BROKEN:
                details.append(f"path {path.source_worker} → {w.worker_id} is broken: {path.detail}\n", "red")
        speed = load.prefill_tokens_per_s if role == "prefill" else load.decode_tokens_per_s
        put_back = f" ({load.put_back_sequences} put back)" if load.put_back_sequences else ""
        cells: dict[str, str | Text] = {
            "role": role,
            "group": w.group,
            "worker": w.worker_id if wide or role in w.worker_id else f"{w.worker_id} ({role})",
            "state": Text(state, style=_STATE_STYLES.get(state, "")),
            "run": str(load.running_sequences),
            "wait": f"{load.waiting_sequences}{put_back}",
            "backlog": str(load.prefill_backlog_tokens),
            "KV in use": _bar(load.total_blocks - load.free_blocks, load.total_blocks),
            "cached": str(load.cached_blocks),
            "leased": f"{load.leased_blocks}{quarantined}",
            "step ms": f"{load.step_ms:.1f}",
            "tok/s": f"{speed:.0f}",
        }
        _add(table, cells)
        details.append(f"{w.worker_id}: {w.device} · attention {w.attention_backend} · {w.transport}\n", "dim")
        if load.verifications_total:
            each = 1 + load.drafts_accepted_total / load.verifications_total
            share = load.drafts_accepted_total / max(load.drafts_total, 1)
            told = f"{each:.1f} tokens a step where it drafts, {share:.0%} of {load.drafts_total} drafts accepted"
            details.append(f"{w.worker_id}: speculation: {told}\n", "dim")
        if w.trial:
            details.append(f"{w.worker_id}: tried at start: {w.trial}\n", "dim")
    return Group(table, details)


def _bar(used: int, total: int) -> Text:
    share = used / total if total else 0.0
    full = round(share * _BAR)
    style = "red" if share > 0.9 else "yellow" if share > 0.7 else "green"
    return Text.assemble(("█" * full, style), ("░" * (_BAR - full), "dim"), f" {used}/{total}")


def _migrations(migrations: Any) -> Table:
    columns: dict[str, bool] = dict.fromkeys(("request", "route", "why", "pause ms", "MB", "outcome"), False)
    table = _table(columns, True, title="migrations", title_justify="left")
    for m in migrations:
        style = {"done": "", "under way": "yellow"}.get(m.outcome, "red")
        outcome = "handing over" if m.outcome == "under way" and m.frozen_ms else m.outcome
        cells: dict[str, str | Text] = {
            "request": m.request_id[:16],
            "route": f"{m.source_worker} → {m.target_worker}",
            "why": m.reason,
            "pause ms": f"{m.pause_ms:.0f}" if m.HasField("pause_ms") else "",
            "MB": f"{m.pulled_bytes / 1e6:.1f}",
            "outcome": Text(outcome, style=style),
        }
        _add(table, cells)
    return table


def _recent(recent: Any, wide: bool) -> Table:
    columns = {"request": False, "route": False, "why": True, "prompt": False, "tokens": False, "TTFT ms": False}
    columns |= {"gap ms": True, "total ms": True, "outcome": False}
    table = _table(columns, wide, title="recent requests", title_justify="left")
    for r in recent:
        split = r.route.placement == PLACEMENTS["split"]
        route = f"{r.route.prefill_worker} → {r.route.decode_worker}" if split else r.route.decode_worker
        cells: dict[str, str | Text] = {
            "request": r.request_id[:16],
            "route": route,
            "why": r.route.rule,
            "prompt": str(r.prompt_tokens),
            "tokens": str(r.completion_tokens),
            "TTFT ms": f"{r.timings.ttft_ms:.0f}",
            "gap ms": f"{r.timings.handoff_gap_ms:.0f}" if split else "",
            "total ms": f"{r.timings.total_ms:.0f}",
            "outcome": Text(r.outcome, style="" if r.outcome in ("stop", "length", "running", "cancelled") else "red"),
        }
        _add(table, cells)
    return table
