"""Assembles a worker from the shared parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from elastic_worker.core import ElasticCore
from kv_transfer.paths import PathMonitor
from settings.telemetry.instruments import Reader
from worker.exchange import build_reader, build_source
from worker.metrics import decode_readers, prefill_readers
from worker.server import RunningWorker, WorkerParts, start_worker
from worker.settings import WorkerSettings


def build_core(parts: WorkerParts) -> ElasticCore:
    config, transport = parts.settings.worker, parts.settings.transport
    numbers = itertools.count(1)
    paths = PathMonitor(parts.transport.submit, numbers, probe_every_s=transport.probe_every_s)
    return ElasticCore(
        parts.engine,
        build_source(parts),
        build_reader(parts, numbers, paths),
        report_every_s=config.report_every_s,
        room_wait_s=config.room_wait_s,
        paths=paths,
    )


def metric_readers(core: ElasticCore) -> dict[str, Reader]:
    source = core.source
    return {
        **prefill_readers(lambda: source.active_leases, lambda: source.outcomes),
        **decode_readers(core, lambda: core.outcomes, lambda: core.pulled_bytes_total),
    }


async def serve(
    role: str, settings: WorkerSettings, router_addresses: Callable[[], Iterable[str]] | None = None
) -> RunningWorker:
    """`role`: "prefill", "decode" or "standby", what it begins with. `router_addresses` overrides the configured ones
    (deploy finds routers through Ray).
    """
    return await start_worker(role, settings, build_core, metric_readers, router_addresses)
