"""Grafana dashboards as values. `as_json` is what Grafana imports (11 or later)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploy.observability.queries import count_rate, gauge, quantile, rate, sum_rate

_WIDTH, _HEIGHT = 8, 8  # three panels side by side
_ROUTE_TTFT = "gen_ai.server.time_to_first_token"
_TPOT = "gen_ai.server.time_per_output_token"
_USAGE = "gen_ai.client.token.usage"


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is Grafana's."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    note: str = ""
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    panels: tuple[Panel, ...]


def _quantiles(name: str, by: str = "", legend: str = "", **matchers: str) -> tuple[Query, ...]:
    labels = (by,) if by else ()
    suffix = f" {{{{{by}}}}}" if by else ""
    return tuple(
        Query(quantile(q, name, *labels, **matchers), f"{legend}p{q * 100:g}{suffix}") for q in (0.5, 0.95, 0.99)
    )


OVERVIEW = Dashboard(
    "diptych-overview",
    "Diptych: overview",
    (
        Panel("Time to first token", "s", _quantiles(_ROUTE_TTFT, "route"), "At the router, by route."),
        Panel("Time per output token", "s", _quantiles(_TPOT), "Mean of one answer."),
        Panel(
            "Handoff gap",
            "s",
            _quantiles("diptych.handoff.gap"),
            "From the first token of split requests to the second.",
        ),
        Panel(
            "Where the time to first token goes",
            "s",
            (
                Query(
                    f"sum by (part) ({rate('diptych.ttft.part')}) / scalar(sum({count_rate(_ROUTE_TTFT)}))",
                    "{{part}}",
                ),
            ),
            "Mean of a request; the parts sum to the mean time to first token.",
            stacked=True,
        ),
        Panel(
            "Requests", "reqps", (Query(f"sum by (outcome) ({rate('diptych.requests')})", "{{outcome}}"),), stacked=True
        ),
        Panel(
            "Errors",
            "reqps",
            (Query(f"sum by (error_type, stage) ({rate('diptych.errors')})", "{{error_type}} {{stage}}"),),
        ),
        Panel(
            "Tokens",
            "short",
            (Query(f"sum by (gen_ai_token_type) ({sum_rate(_USAGE)})", "{{gen_ai_token_type}} per s"),),
            "Of requests that ended.",
        ),
        Panel(
            "Requests in progress",
            "short",
            (
                Query(f"sum({gauge('diptych.requests.live')})", "live"),
                Query(f"max({gauge('diptych.requests.waiting')})", "waiting at workers"),
            ),
        ),
        Panel("KV of decode workers in use", "percentunit", (Query(f"max({gauge('diptych.kv.used')})", "used"),)),
        Panel(
            "Workers",
            "short",
            (Query(f"max by (role, state) ({gauge('diptych.workers')}) > 0", "{{role}} {{state}}"),),
            "As routers see them.",
        ),
        Panel(
            "Cost of a million tokens",
            "short",
            (
                Query(
                    f"max by (gen_ai_token_type) ({gauge('diptych.cost.rate')}) / 3600 / "
                    f"(sum by (gen_ai_token_type) ({sum_rate(_USAGE)}) > 0) * 1e6",
                    "{{gen_ai_token_type}}",
                ),
            ),
            "Needs telemetry.gpu_price_per_hour. Right with several routers, too: each sees all workers.",
        ),
        Panel(
            "Prompt tokens from a cache",
            "percentunit",
            (
                Query(
                    f"sum({rate('diptych.prompt.cached')}) / (sum({sum_rate(_USAGE, gen_ai_token_type='input')}) > 0)",
                    "share",
                ),
            ),
        ),
        Panel("Serving", "short", (Query(gauge("diptych.serving"), "{{instance}}"),)),
        Panel(
            "Workers wanted",
            "short",
            (Query(f"max by (role) ({gauge('diptych.scaling.wanted')})", "{{role}}"),),
            "By the scaling policy; in a dry run nobody acts on it.",
        ),
        Panel(
            "GPUs held, and the budget",
            "short",
            (Query(f"max by (state) ({gauge('diptych.scaling.gpus')})", "{{state}}"),),
        ),
        Panel(
            "Scaling decisions",
            "reqps",
            (
                Query(f"max by (rule, mode) ({rate('diptych.scaling.decisions')})", "{{rule}}, {{mode}}"),
                Query(f"max({rate('diptych.scaling.errors')})", "refused by the platform"),
            ),
            "Every router is told of all of them.",
        ),
        Panel(
            "Since the last scaling decision",
            "s",
            (
                Query(f"min by (mode) ({gauge('diptych.scaling.age')})", "{{mode}}"),
                Query(f"max by (mode) ({gauge('diptych.scaling.interval')})", "interval, {{mode}}"),
            ),
        ),
    ),
)

WORKERS = Dashboard(
    "diptych-workers",
    "Diptych: workers",
    (
        Panel("Step duration", "s", _quantiles("diptych.step.duration", "step")),
        Panel("Queue on the worker", "s", _quantiles("diptych.queue.duration", "instance")),
        Panel(
            "Sequences",
            "short",
            (Query(f"sum by (instance, state) ({gauge('diptych.sequences')})", "{{instance}} {{state}}"),),
        ),
        Panel(
            "Free KV blocks",
            "percentunit",
            (
                Query(
                    f"sum by (instance) ({gauge('diptych.kv.blocks', state='free')}) / "
                    f"sum by (instance) ({gauge('diptych.kv.blocks', state='total')})",
                    "{{instance}}",
                ),
            ),
        ),
        Panel(
            "Leased and quarantined blocks",
            "short",
            (
                Query(
                    f"sum by (instance, state) ({gauge('diptych.kv.blocks', state='~leased|quarantined')})",
                    "{{instance}} {{state}}",
                ),
            ),
        ),
        Panel("Prompt tokens waiting", "short", (Query(gauge("diptych.prefill.backlog"), "{{instance}}"),)),
        Panel(
            "Tokens through the model",
            "short",
            (
                Query(
                    f"sum by (instance, gen_ai_token_type) ({rate('diptych.tokens.computed')})",
                    "{{instance}} {{gen_ai_token_type}} per s",
                ),
            ),
        ),
        Panel(
            "Busy",
            "percentunit",
            (
                Query(
                    f"sum by (instance, gen_ai_token_type) ({rate('diptych.busy')})",
                    "{{instance}} {{gen_ai_token_type}}",
                ),
            ),
            "Share of the time spent in steps, by kind of token.",
            stacked=True,
        ),
        Panel(
            "Busiest expert over the mean",
            "short",
            (Query(f"max by (instance) ({gauge('diptych.experts.imbalance')})", "{{instance}}"),),
            "Of the layer that is worst off; 1 is even. Only for mixtures of experts.",
        ),
        Panel(
            "Tokens computed by experts",
            "short",
            (Query(f"sum by (instance) ({rate('diptych.experts.tokens')})", "{{instance}} per s"),),
            "A token counts once for every expert that it was sent to, in every layer.",
        ),
        Panel(
            "Tokens computed by experts, by group of ranks",
            "short",
            (
                Query(
                    f"sum by (instance, group) ({rate('diptych.experts.group.tokens')})", "{{instance}} {{group}} per s"
                ),
            ),
            "Where a worker's experts are split over groups of its ranks.",
        ),
        Panel(
            "Adapters",
            "short",
            (
                Query(f"max by (instance, state) ({gauge('diptych.adapters')})", "{{instance}} {{state}}"),
                Query(f"sum by (outcome) ({rate('diptych.adapter.loads')})", "{{outcome}} per s"),
            ),
            "LoRA adapters: names that are served, kept for answers that began on them, lost; commands to load one.",
        ),
        Panel(
            "Slots of adapters",
            "short",
            (
                Query(f"sum by (instance) ({rate('diptych.adapter.slots.filled')})", "{{instance}} filled per s"),
                Query(f"max by (instance) ({gauge('diptych.adapter.slot.time')})", "{{instance}} s for each"),
            ),
            "A slot that is given to another adapter holds up a step that long: many of them mean too few slots.",
        ),
        Panel(
            "Drafted tokens",
            "short",
            (
                Query(f"sum by (outcome) ({rate('diptych.drafts')})", "{{outcome}} per s"),
                Query(f"sum ({rate('diptych.verifications')})", "verifications per s"),
            ),
            "Speculative decoding. Accepted drafts per verification are the tokens gained per step.",
        ),
        Panel("Preemptions", "short", (Query(f"sum by (instance) ({rate('diptych.preemptions')})", "{{instance}}"),)),
        Panel(
            "Prompt tokens from the worker's cache",
            "short",
            (Query(f"sum by (instance) ({rate('diptych.cache.hit')})", "{{instance}} per s"),),
        ),
        Panel(
            "Watchdog",
            "short",
            (Query(f"max by (instance, part) ({gauge('diptych.watchdog.health')})", "{{instance}} {{part}}"),),
            "0 healthy, 1 may be stuck, 2 stuck.",
        ),
    ),
)

HANDOFFS = Dashboard(
    "diptych-handoffs",
    "Diptych: decisions and handoffs",
    (
        Panel(
            "Decisions",
            "reqps",
            (Query(f"sum by (route, rule) ({rate('diptych.decisions')})", "{{route}} {{rule}}"),),
            stacked=True,
        ),
        Panel("Handoffs", "reqps", (Query(f"sum by (outcome) ({rate('diptych.handoffs')})", "{{outcome}}"),)),
        Panel("KV moved", "Bps", (Query(f"sum by (instance) ({rate('diptych.transfer.io')})", "{{instance}}"),)),
        Panel(
            "Transfer",
            "s",
            _quantiles("diptych.transfer.duration"),
            "From the first announcement to adoption: most of it runs beside the prefill.",
        ),
        Panel("Adoption", "s", _quantiles("diptych.adopt.duration"), "From the last announcement to adoption."),
        Panel("Handoff gap", "s", _quantiles("diptych.handoff.gap")),
        Panel("Leases that ended", "reqps", (Query(f"sum by (outcome) ({rate('diptych.leases')})", "{{outcome}}"),)),
        Panel("Leases in force", "short", (Query(gauge("diptych.leases.active"), "{{instance}}"),)),
        Panel(
            "Paths", "short", (Query(f"sum by (instance, state) ({gauge('diptych.paths')})", "{{instance}} {{state}}"),)
        ),
        Panel(
            "Running answers moved",
            "reqps",
            (
                Query(
                    f"sum by (outcome, reason) ({rate('diptych.migrations')})",
                    "{{outcome}}, {{reason}}",
                ),
            ),
        ),
        Panel("Pause of a moved answer", "s", _quantiles("diptych.migration.pause", "reason")),
        Panel("KV moved with answers", "Bps", (Query(f"sum({rate('diptych.migration.io')})", "bytes"),)),
        Panel(
            "Role switches",
            "reqps",
            (Query(f"sum by (from, to) ({rate('diptych.role.switches')})", "{{from}} → {{to}}"),),
        ),
        Panel("Recoveries", "reqps", (Query(f"sum by (kind) ({rate('diptych.recoveries')})", "{{kind}}"),)),
        Panel(
            "Prefixes pulled", "reqps", (Query(f"sum by (outcome) ({rate('diptych.prefix.pulls')})", "{{outcome}}"),)
        ),
        Panel("Retries", "reqps", (Query(f"sum({rate('diptych.retries')})", "from the budget"),)),
        Panel(
            "On a worker when it crashed",
            "reqps",
            (Query(f"sum by (shape) ({rate('diptych.crashes')})", "{{shape}}"),),
            "A query of death shows as a shape that stands out.",
        ),
        Panel(
            "Request duration", "s", _quantiles("gen_ai.server.request.duration", "route"), "Failed requests included."
        ),
    ),
)

DASHBOARDS = (OVERVIEW, WORKERS, HANDOFFS)


def as_json(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["diptych"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}]
        },
        "panels": [_panel(number, panel) for number, panel in enumerate(dashboard.panels)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.note,
        "datasource": source,
        "gridPos": {"x": number % 3 * _WIDTH, "y": number // 3 * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {
                    "fillOpacity": 40 if panel.stacked else 5,
                    "stacking": {"mode": "normal" if panel.stacked else "none"},
                },
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": query.expr, "legendFormat": query.legend}
            for i, query in enumerate(panel.queries)
        ],
    }
