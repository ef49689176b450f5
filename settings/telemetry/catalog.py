"""Every metric there is, once. Registration, docs/metrics.md, dashboards and alert rules all come from this list.

Names and units follow OpenTelemetry; `gen_ai.*` are its semantic conventions for generative AI. The Prometheus names
are those that the maintained exporter makes: dots become underscores, units become suffixes, counters end in `_total`.
Label values are bounded: by an enumeration, by the configuration (one model), or by `MAX_LABEL_SETS`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

MAX_LABEL_SETS = 200  # of one metric in one process; what comes after is not exported, and the log says so


class Kind(enum.StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(enum.StrEnum):
    """Which processes have it: of a worker, by the role that it starts with."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    STANDBY = "standby"


@dataclass(frozen=True, slots=True)
class Metric:
    """`unit` in UCUM. `buckets`: upper bounds of a histogram."""

    name: str
    kind: Kind
    unit: str
    help: str
    sources: tuple[Source, ...]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def prometheus_name(self) -> str:
        """As scraped; of a histogram without `_bucket`, `_sum` or `_count`."""
        name = self.name.replace(".", "_")
        suffix = _UNIT_SUFFIXES.get(self.unit, "")
        if suffix and not name.endswith(suffix):
            name += suffix
        return f"{name}_total" if self.kind is Kind.COUNTER else name

    @property
    def prometheus_labels(self) -> tuple[str, ...]:
        return tuple(label.replace(".", "_") for label in self.labels)

    @property
    def series(self) -> tuple[str, ...]:
        """All names that a query may use."""
        name = self.prometheus_name
        return (f"{name}_bucket", f"{name}_sum", f"{name}_count") if self.kind is Kind.HISTOGRAM else (name,)


_UNIT_SUFFIXES = {"s": "_seconds", "By": "_bytes"}

_ROUTER = (Source.ROUTER,)


_WORKERS = (Source.PREFILL, Source.DECODE, Source.STANDBY)

# Of the conventions, so that figures of different servers can be laid side by side.
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_TPOT_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68)
_TOKENS = tuple(float(4**i) for i in range(11))
_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)

GEN_AI = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model")

TTFT_PARTS = (
    "admission",
    "decide",
    "recovery",
    "network",
    "worker_queue",
    "prefill",
    "prefill_wait",
    "worker_send",
)

CATALOG: tuple[Metric, ...] = (
    # What a client sees.
    Metric(
        "gen_ai.server.time_to_first_token",
        Kind.HISTOGRAM,
        "s",
        "From arrival at the router to the first token there.",
        _ROUTER,
        (*GEN_AI, "route"),
        _TTFT_S,
    ),
    Metric(
        "gen_ai.server.time_per_output_token",
        Kind.HISTOGRAM,
        "s",
        "Mean time between the tokens of one answer, after the first.",
        _ROUTER,
        (*GEN_AI, "route"),
        _TPOT_S,
    ),
    Metric(
        "gen_ai.server.request.duration",
        Kind.HISTOGRAM,
        "s",
        "From arrival to the end of the answer. error.type is the status of a failed one.",
        _ROUTER,
        (*GEN_AI, "route", "error.type"),
        _DURATION_S,
    ),
    Metric(
        "gen_ai.client.token.usage",
        Kind.HISTOGRAM,
        "{token}",
        "Tokens of one request, as input (the prompt) and output.",
        _ROUTER,
        (*GEN_AI, "gen_ai.token.type"),
        _TOKENS,
    ),
    Metric(
        "diptych.handoff.gap",
        Kind.HISTOGRAM,
        "s",
        "From the first token of a split request to the second.",
        _ROUTER,
        buckets=_TPOT_S,
    ),
    Metric(
        "diptych.ttft.part",
        Kind.COUNTER,
        "s",
        "Time to first token by part; the parts of a request sum to its time to first token.",
        _ROUTER,
        ("part",),
    ),
    Metric(
        "diptych.requests",
        Kind.COUNTER,
        "{request}",
        "Requests that ended, by outcome: stop, length, cancelled, or the error's status.",
        _ROUTER,
        ("outcome",),
    ),
    Metric(
        "diptych.errors",
        Kind.COUNTER,
        "{error}",
        "Requests that got an error, by status: refused before any work, or failed.",
        _ROUTER,
        ("error.type", "stage"),
    ),
    Metric("diptych.requests.live", Kind.GAUGE, "{request}", "Requests in progress.", _ROUTER),
    # With that, what gateways choose a router by (docs/kubernetes.md, "Gateways").
    Metric(
        "diptych.requests.waiting",
        Kind.GAUGE,
        "{request}",
        "Sequences that wait at workers for room or a turn.",
        _ROUTER,
    ),
    Metric("diptych.kv.used", Kind.GAUGE, "1", "Share of the decode workers' KV that is taken or spoken for.", _ROUTER),
    # What the router decides.
    Metric(
        "diptych.decisions",
        Kind.COUNTER,
        "{decision}",
        "First placements, by route (local, split) and the rule that fired.",
        _ROUTER,
        ("route", "rule"),
    ),
    Metric(
        "diptych.recoveries",
        Kind.COUNTER,
        "{recovery}",
        "Recoveries of requests after a fault, by what was done.",
        _ROUTER,
        ("kind",),
    ),
    Metric(
        "diptych.crashes",
        Kind.COUNTER,
        "{request}",
        "Requests that were on a worker when it crashed, by what they asked of it: a query of death shows as a "
        "shape that stands out.",
        _ROUTER,
        ("shape",),
    ),
    Metric(
        "diptych.retries",
        Kind.COUNTER,
        "{retry}",
        "Recoveries that used the retry budget.",
        _ROUTER,
    ),
    Metric(
        "diptych.prompt.cached",
        Kind.COUNTER,
        "{token}",
        "Prompt tokens of ended requests whose KV was found in a cache.",
        _ROUTER,
    ),
    Metric(
        "diptych.workers",
        Kind.GAUGE,
        "{worker}",
        "Workers known to the router, by role and state.",
        _ROUTER,
        ("role", "state"),
    ),
    Metric(
        "diptych.role.switches",
        Kind.COUNTER,
        "{switch}",
        "Workers that changed their role, as this router heard of it.",
        _ROUTER,
        ("from", "to"),
    ),
    Metric(
        "diptych.migrations",
        Kind.COUNTER,
        "{migration}",
        "Running answers that were to go on elsewhere: done, or stayed where they were; by why: their worker leaves, "
        "switches its role, is short of KV (pressure) or slower than another (balance), or somebody asked.",
        _ROUTER,
        ("outcome", "reason"),
    ),
    Metric(
        "diptych.migration.pause",
        Kind.HISTOGRAM,
        "s",
        "Of a migrated answer, from the last token of one worker to the first of the other.",
        _ROUTER,
        ("reason",),
        _TPOT_S,
    ),
    Metric("diptych.migration.io", Kind.COUNTER, "By", "KV that migrations pulled.", _ROUTER),
    # How many workers there should be, as the router was told last.
    Metric(
        "diptych.scaling.wanted",
        Kind.GAUGE,
        "{worker}",
        "Workers that the scaling policy wants, by role. In a dry run nobody starts or stops any.",
        _ROUTER,
        ("role",),
    ),
    Metric(
        "diptych.scaling.gpus",
        Kind.GAUGE,
        "{gpu}",
        "GPUs that workers held at the last scaling decision (held), and may hold (budget).",
        _ROUTER,
        ("state",),
    ),
    Metric(
        "diptych.scaling.decisions",
        Kind.COUNTER,
        "{decision}",
        "Scaling decisions by the rule that fired, applied or only said (dry_run).",
        _ROUTER,
        ("rule", "mode"),
    ),
    Metric(
        "diptych.scaling.errors",
        Kind.COUNTER,
        "{error}",
        "Scaling decisions that the platform refused.",
        _ROUTER,
    ),
    Metric(
        "diptych.scaling.age",
        Kind.GAUGE,
        "s",
        "Time since the last scaling decision, applied or only said (dry_run). None before the first.",
        _ROUTER,
        ("mode",),
    ),
    Metric(
        "diptych.scaling.interval",
        Kind.GAUGE,
        "s",
        "Time between scaling decisions, as whoever decides has it.",
        _ROUTER,
        ("mode",),
    ),
    Metric("diptych.serving", Kind.GAUGE, "1", "1: a request would be answered.", _ROUTER),
    # Money.
    Metric(
        "diptych.cost.rate",
        Kind.GAUGE,
        "1",
        "Hourly price of all ready workers, in the currency of the settings, by the tokens that it is charged to.",
        _ROUTER,
        ("gen_ai.token.type",),
    ),
    Metric(
        "diptych.cost.per_million_tokens",
        Kind.GAUGE,
        "1",
        "Price of a million tokens over the last minute, by type; from this router's tokens only.",
        _ROUTER,
        ("gen_ai.token.type",),
    ),
    # The engine.
    Metric(
        "diptych.sequences",
        Kind.GAUGE,
        "{sequence}",
        "Sequences that hold blocks (running) or do not yet (waiting); of both, prompts that let others go first "
        "(put_back).",
        _WORKERS,
        ("state",),
    ),
    Metric("diptych.prefill.backlog", Kind.GAUGE, "{token}", "Prompt tokens accepted and not computed yet.", _WORKERS),
    Metric(
        "diptych.queue.duration",
        Kind.HISTOGRAM,
        "s",
        "From a sequence's arrival at the worker to its first step, without the wait for KV from elsewhere.",
        _WORKERS,
        buckets=_TTFT_S,
    ),
    Metric(
        "diptych.step.duration",
        Kind.HISTOGRAM,
        "s",
        "One engine step, by what it computed: prompts (prefill), next tokens (decode), or both (mixed).",
        _WORKERS,
        ("step",),
        _STEP_S,
    ),
    Metric(
        "diptych.busy",
        Kind.COUNTER,
        "s",
        "Time in steps, charged to prompt tokens (input) and sampled tokens (output) by their number.",
        _WORKERS,
        ("gen_ai.token.type",),
    ),
    Metric(
        "diptych.tokens.computed",
        Kind.COUNTER,
        "{token}",
        "Tokens that went through the model: of prompts (input), sampled (output).",
        _WORKERS,
        ("gen_ai.token.type",),
    ),
    Metric(
        "diptych.cache.hit",
        Kind.COUNTER,
        "{token}",
        "Prompt tokens found in this worker's prefix cache, or pulled from another worker's.",
        _WORKERS,
    ),
    Metric(
        "diptych.prefix.pulls",
        Kind.COUNTER,
        "{pull}",
        "Prefixes from another worker's cache: pulled, or failed and computed.",
        _WORKERS,
        ("outcome",),
    ),
    Metric(
        "diptych.preemptions",
        Kind.COUNTER,
        "{sequence}",
        "Sequences that were preempted: they gave up their blocks.",
        _WORKERS,
    ),
    Metric(
        "diptych.verifications",
        Kind.COUNTER,
        "{step}",
        "Speculative decoding: steps of one sequence each that verified drafts of its. Each gives one token, and one "
        "more for every draft that is accepted.",
        _WORKERS,
    ),
    Metric(
        "diptych.drafts",
        Kind.COUNTER,
        "{token}",
        "Drafted tokens, by what became of them.",
        _WORKERS,
        ("outcome",),
    ),
    Metric(
        "diptych.experts.tokens",
        Kind.COUNTER,
        "{token}",
        "Tokens that experts computed: a token counts once for every expert that it was sent to, in every layer. None "
        "for a model without experts.",
        _WORKERS,
    ),
    Metric(
        "diptych.experts.group.tokens",
        Kind.COUNTER,
        "{token}",
        "The same by group of ranks, where the experts of a worker are split over several (engine.expert_parallel).",
        _WORKERS,
        ("group",),
    ),
    Metric(
        "diptych.experts.imbalance",
        Kind.GAUGE,
        "1",
        "Tokens of the busiest expert over the mean of all, of the layer that is worst off, over the last one to two "
        "minutes: 1 is even, the number of experts means that one does all. 0: no tokens. None for a model without "
        "experts.",
        _WORKERS,
    ),
    Metric(
        "diptych.adapters",
        Kind.GAUGE,
        "{adapter}",
        "LoRA adapters: names that are served; kept for answers that began on them; lost, of both, as their files are "
        "gone or others. None where there are no adapters.",
        _WORKERS,
        ("state",),
    ),
    Metric(
        "diptych.adapter.loads",
        Kind.COUNTER,
        "{load}",
        "Commands to load an adapter while the worker serves.",
        _WORKERS,
        ("outcome",),
    ),
    Metric(
        "diptych.adapter.slots.filled",
        Kind.COUNTER,
        "{slot}",
        "How often a slot was given to another adapter: much more often than requests come means too few slots.",
        _WORKERS,
    ),
    Metric(
        "diptych.adapter.slot.time",
        Kind.GAUGE,
        "s",
        "Recent mean of filling a slot, which a step waits for. 0: none was filled.",
        _WORKERS,
    ),
    Metric(
        "diptych.kv.blocks",
        Kind.GAUGE,
        "{block}",
        "KV blocks: total; free (allocatable now); cached (findable, in use or not); leased (promised to readers); "
        "quarantined (of abandoned pulls). The states overlap.",
        _WORKERS,
        ("state",),
    ),
    Metric(
        "diptych.watchdog.health",
        Kind.GAUGE,
        "1",
        "0: healthy. 1: something may be stuck. 2: it is stuck, and the worker ends.",
        _WORKERS,
        ("part",),
    ),
    # Of every process.
    Metric(
        "diptych.certificate.expiry",
        Kind.GAUGE,
        "s",
        "Expiry of the certificate in use (Unix time), by listener: public, internal. None without TLS.",
        (Source.ROUTER, *_WORKERS),
        ("listener",),
    ),
    # Handoffs.
    Metric("diptych.leases.active", Kind.GAUGE, "{lease}", "Leases in force.", _WORKERS),
    Metric(
        "diptych.leases",
        Kind.COUNTER,
        "{lease}",
        "Leases that ended: released (adopted), cancelled, expired.",
        _WORKERS,
        ("outcome",),
    ),
    Metric(
        "diptych.handoffs",
        Kind.COUNTER,
        "{handoff}",
        "Handoffs that ended here: adopted, or the reason why not.",
        _WORKERS,
        ("outcome",),
    ),
    Metric("diptych.transfer.io", Kind.COUNTER, "By", "KV that was pulled and adopted.", _WORKERS),
    Metric(
        "diptych.transfer.duration",
        Kind.HISTOGRAM,
        "s",
        "From the first announcement to adoption: the transfer runs beside the prefill.",
        _WORKERS,
        buckets=_TTFT_S,
    ),
    Metric(
        "diptych.adopt.duration",
        Kind.HISTOGRAM,
        "s",
        "From the last announcement to adoption: the part of the transfer that may delay the client.",
        _WORKERS,
        buckets=_TTFT_S,
    ),
    Metric(
        "diptych.paths",
        Kind.GAUGE,
        "{path}",
        "Paths from prefill workers to this one, by state: unproven, ok, broken.",
        _WORKERS,
        ("state",),
    ),
)

BY_NAME = {metric.name: metric for metric in CATALOG}


def of_source(source: Source) -> tuple[Metric, ...]:
    return tuple(metric for metric in CATALOG if source in metric.sources)
