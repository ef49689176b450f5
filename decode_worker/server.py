"""Assembles a decode worker from the shared parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from decode_worker.core import DecodeCore
from kv_transfer.nixl_transport import LANE_SLOTS
from kv_transfer.paths import PathMonitor
from kv_transfer.reader import HandoffReader
from settings.telemetry.instruments import Reader
from worker.metrics import decode_readers
from worker.server import RunningWorker, WorkerParts, start_worker
from worker.settings import WorkerSettings

_PULL_BYTES = 8 << 20  # a transfer over shared memory copies inside one call: keep calls short


def build_core(parts: WorkerParts) -> DecodeCore:
    config, transport = parts.settings.worker, parts.settings.transport
    block_bytes = parts.runner.block_bytes
    numbers = itertools.count(1)
    paths = PathMonitor(parts.transport.submit, numbers, probe_every_s=transport.probe_every_s)
    reader = HandoffReader(
        parts.pool,
        parts.transport.submit,
        parts.transport.abandon,
        block_bytes=block_bytes,
        pull_timeout_s=transport.pull_timeout_s,
        announce_timeout_s=config.announce_timeout_s,
        renew_every_s=config.lease_s / 3,
        max_blocks_per_pull=min(config.max_blocks_per_pull, max(1, _PULL_BYTES // block_bytes), LANE_SLOTS),
        max_quarantined_blocks=int(parts.pool.num_blocks * config.max_quarantined_share),
        numbers=numbers,
        observe=paths.observe,
    )
    return DecodeCore(
        parts.engine, reader, report_every_s=config.report_every_s, room_wait_s=config.room_wait_s, paths=paths
    )


def metric_readers(core: DecodeCore) -> dict[str, Reader]:
    return decode_readers(core, lambda: core.outcomes, lambda: core.pulled_bytes_total)


async def serve(settings: WorkerSettings, router_addresses: Callable[[], Iterable[str]] | None = None) -> RunningWorker:
    """`router_addresses` overrides the configured ones (deploy finds routers through Ray)."""
    return await start_worker("decode", settings, build_core, metric_readers, router_addresses)
