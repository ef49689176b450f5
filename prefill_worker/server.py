"""Assembles a prefill worker from the shared parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from prefill_worker.core import PrefillCore
from settings.telemetry.instruments import Reader
from worker.exchange import build_reader, build_source
from worker.metrics import prefill_readers
from worker.server import RunningWorker, WorkerParts, start_worker
from worker.settings import WorkerSettings


def build_core(parts: WorkerParts) -> PrefillCore:
    reader = build_reader(parts, itertools.count(1), None)
    return PrefillCore(parts.engine, build_source(parts), reader, report_every_s=parts.settings.worker.report_every_s)


def metric_readers(core: PrefillCore) -> dict[str, Reader]:
    source = core.source
    return prefill_readers(lambda: source.active_leases, lambda: source.outcomes)


async def serve(settings: WorkerSettings, router_addresses: Callable[[], Iterable[str]] | None = None) -> RunningWorker:
    """`router_addresses` overrides the configured ones (deploy finds routers through Ray)."""
    return await start_worker("prefill", settings, build_core, metric_readers, router_addresses)
