"""Assembles a decode worker from the shared parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from decode_worker.core import DecodeCore
from kv_transfer.paths import PathMonitor
from settings.telemetry.instruments import Reader
from worker.exchange import build_reader, build_source
from worker.metrics import decode_readers
from worker.server import RunningWorker, WorkerParts, start_worker
from worker.settings import WorkerSettings


def build_core(parts: WorkerParts) -> DecodeCore:
    config, transport = parts.settings.worker, parts.settings.transport
    numbers = itertools.count(1)
    paths = PathMonitor(parts.transport.submit, numbers, probe_every_s=transport.probe_every_s)
    return DecodeCore(
        parts.engine,
        build_reader(parts, numbers, paths),
        build_source(parts),
        report_every_s=config.report_every_s,
        room_wait_s=config.room_wait_s,
        paths=paths,
    )


def metric_readers(core: DecodeCore) -> dict[str, Reader]:
    return decode_readers(core, lambda: core.outcomes, lambda: core.pulled_bytes_total)


async def serve(settings: WorkerSettings, router_addresses: Callable[[], Iterable[str]] | None = None) -> RunningWorker:
    """`router_addresses` overrides the configured ones (deploy finds routers through Ray)."""
    return await start_worker("decode", settings, build_core, metric_readers, router_addresses)
