"""A router's numbers as the catalog's metrics: counters and gauges are read when asked, histograms once per request."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from prometheus_client import generate_latest

from router.breakdown import Migration
from router.lifecycle import Life
from router.placement.cluster import Cluster, Role, WorkerEntry, WorkerState
from router.record.counts import BusyByRole, CostWindow, PoolUse, RouterCounts, route_name
from router.record.moved import MoveLog, reason_word
from router.record.scaled import ScalingLog
from router.request import Finish
from settings.addresses import join
from settings.telemetry.catalog import Source
from settings.telemetry.config import TelemetryConfig
from settings.telemetry.instruments import Labels, Reader, by, plain
from settings.telemetry.setup import Metrics
from settings.tls import Wiring

_RENDER_EVERY_S = 1.0
_PROVIDER = "diptych"
_COMPLETE = (Finish.STOP.value, Finish.LENGTH.value)


class Moves(Protocol):
    log: MoveLog


class Observed(Protocol):
    """What is told of a router: the dispatcher has it."""

    cluster: Cluster
    counts: RouterCounts
    model_name: str
    on_ended: Callable[[Life], None] | None

    @property
    def moves(self) -> Moves: ...

    @property
    def live_requests(self) -> int: ...

    @property
    def retries_total(self) -> int: ...


class RouterMetrics:
    """Raises MetricsEndpointError when the port cannot be had. `look` wants to be called about once a second."""

    def __init__(
        self,
        config: TelemetryConfig,
        dispatcher: Observed,
        instance: str,
        serving: Callable[[], bool],
        wiring: Wiring,
        scaling: ScalingLog | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._scaling = scaling or ScalingLog()
        self._instance = instance
        prices = config.gpu_price_per_hour
        self._prices = {Role.PREFILL: prices.prefill, Role.DECODE: prices.decode, Role.STANDBY: prices.decode}
        self._busy = BusyByRole()
        self._serving = serving
        self._serving_now = False
        self._cost = CostWindow()
        self._workers: Counter[tuple[str, str]] = Counter()
        self._waiting, self._kv_used = 0, 0.0
        self._targets: list[tuple[str, str, str]] = []
        self._metrics = Metrics(
            config, Source.ROUTER, instance, self._readers(wiring), self._sd_targets, wiring.https()
        )
        self._rendered, self._rendered_at = b"", -math.inf
        self.port = self._metrics.port
        self.address = "" if self.port is None else join(config.metrics_host, self.port)
        dispatcher.on_ended = self._ended
        dispatcher.moves.log.on_over = self._moved

    def text(self) -> bytes:
        """Prometheus' text format, for the router's own HTTP port; computed once a second at most."""
        now = time.monotonic()
        if now - self._rendered_at >= _RENDER_EVERY_S:
            self._rendered_at, self._rendered = now, generate_latest(self._metrics.registry)
        return self._rendered

    def close(self) -> None:
        self._metrics.close()

    def _readers(self, wiring: Wiring) -> dict[str, Reader]:
        d, counts, scaling = self._dispatcher, self._dispatcher.counts, self._scaling
        token_type = "gen_ai.token.type"
        return {
            "diptych.ttft.part": by("part", lambda: counts.ttft_parts_s),
            "diptych.requests": by("outcome", lambda: counts.outcomes),
            "diptych.errors": _by_two(("error.type", "stage"), lambda: counts.errors),
            "diptych.requests.live": plain(lambda: d.live_requests),
            "diptych.requests.waiting": plain(lambda: self._waiting),
            "diptych.kv.used": plain(lambda: self._kv_used),
            "diptych.decisions": _by_two(("route", "rule"), lambda: counts.decisions),
            "diptych.recoveries": by("kind", lambda: counts.recoveries),
            "diptych.crashes": by("shape", lambda: counts.crashes),
            "diptych.retries": plain(lambda: d.retries_total),
            "diptych.prompt.cached": plain(lambda: counts.cached_tokens),
            "diptych.workers": _by_two(("role", "state"), lambda: self._workers),
            "diptych.role.switches": _by_two(("from", "to"), lambda: d.cluster.switches),
            "diptych.migrations": _by_two(("outcome", "reason"), lambda: d.moves.log.outcomes),
            "diptych.migration.io": plain(lambda: d.moves.log.pulled_bytes),
            "diptych.scaling.wanted": by("role", scaling.wanted),
            "diptych.scaling.gpus": by("state", scaling.gpus),
            "diptych.scaling.decisions": _by_two(("rule", "mode"), lambda: scaling.rules),
            "diptych.scaling.errors": plain(lambda: scaling.errors_total),
            "diptych.scaling.age": by("mode", lambda: scaling.ages_s(time.monotonic())),
            "diptych.scaling.interval": by("mode", scaling.intervals_s),
            "diptych.serving": plain(lambda: float(self._serving_now)),
            "diptych.certificate.expiry": by("listener", wiring.expiries),
            "diptych.cost.rate": by(token_type, lambda: self._cost.rate_per_hour),
            "diptych.cost.per_million_tokens": by(token_type, lambda: self._cost.per_million),
        }

    def look(self, now: float) -> None:
        """On the event loop, which owns the cluster: what scrapes see of it."""
        d = self._dispatcher
        self._serving_now = self._serving()
        entries = list(d.cluster.workers.values())
        # Every state is told, also with 0: a series that ends says nothing to an alert.
        seen = Counter({(role.value, state.value): 0 for role in Role for state in WorkerState})
        seen.update((e.role.value, e.state.value) for e in entries)
        self._workers = seen
        self._targets = [
            (e.info.metrics_address, e.role.value, e.key.worker_id)
            for e in entries
            if e.info.metrics_address and e.state is not WorkerState.LOST
        ]
        self._waiting = sum(e.load.waiting_sequences for e in entries if e.load is not None)
        self._kv_used = _kv_used(e for e in entries if e.role is Role.DECODE and e.state is not WorkerState.LOST)
        pools = {}
        self._busy.look((e.key, e.role.value, e.load) for e in entries if e.load is not None)
        for role in Role:
            input_busy_s, output_busy_s = self._busy.of(role.value)
            pools[role.value] = PoolUse(
                ready=seen[role.value, WorkerState.READY.value] + seen[role.value, WorkerState.DRAINING.value],
                price_per_hour=self._prices[role],
                input_busy_s=input_busy_s,
                output_busy_s=output_busy_s,
                input_share_when_idle=1.0 if role is Role.PREFILL else 0.0,
            )
        self._cost.look(now, pools, d.counts.input_tokens, d.counts.output_tokens)

    def _sd_targets(self) -> list[dict[str, Any]]:
        """For Prometheus' http_sd_config: this router, and the workers that it knows."""
        known = [(self.address, "router", self._instance), *self._targets]
        return [
            {"targets": [address], "labels": {"instance": name, "diptych_role": role}} for address, role, name in known
        ]

    def _moved(self, migration: Migration) -> None:
        if migration.pause_s is not None:
            labels = {"reason": reason_word(migration.why)}
            self._metrics.record("diptych.migration.pause", migration.pause_s, labels)

    def _ended(self, life: Life) -> None:
        record, times, route = self._metrics.record, life.times, route_name(life.route)
        common = {
            "gen_ai.operation.name": life.request.operation,
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": self._dispatcher.model_name,
        }
        labels = {**common, "route": route}
        arrived, first, last, output = life.request.arrived, times.first_token, times.last_token, life.answered_tokens
        again = life.request.again  # of several answers to one request the first counts as the request
        if first is not None:
            if not again:
                record("gen_ai.server.time_to_first_token", first - arrived, labels)
            if last is not None and output > 1:
                record("gen_ai.server.time_per_output_token", (last - first) / (output - 1), labels)
            if route == "split" and times.second_token is not None:
                record("diptych.handoff.gap", times.second_token - first)
        if times.ended is not None and not again:
            failed = life.outcome not in (*_COMPLETE, Finish.CANCELLED.value)
            record(
                "gen_ai.server.request.duration",
                times.ended - arrived,
                {**labels, "error.type": life.outcome} if failed else labels,
            )
        if not again:
            record("gen_ai.client.token.usage", len(life.request.prompt), {**common, "gen_ai.token.type": "input"})
        record("gen_ai.client.token.usage", output, {**common, "gen_ai.token.type": "output"})


def _kv_used(decode: Iterable[WorkerEntry]) -> float:
    """1 where there is none: nothing more would fit."""
    total = free = 0
    for entry in decode:
        if entry.load is not None:
            total += entry.info.total_blocks
            free += max(0, entry.load.free_blocks - entry.load.waiting_blocks)
    return 1 - free / total if total else 1.0


def _by_two(labels: tuple[str, str], read: Callable[[], Counter[tuple[str, str]]]) -> Reader:
    first, second = labels

    def observe() -> Iterable[tuple[float, Labels]]:
        return [(count, {first: a, second: b}) for (a, b), count in dict(read()).items()]

    return observe
