"""Assembles a prefill worker from the shared parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kv_transfer.source import HandoffSource
from kv_transfer.transport_inprocess import block_digest
from prefill_worker.core import PrefillCore
from settings.telemetry.instruments import Reader
from worker.metrics import prefill_readers
from worker.server import RunningWorker, WorkerParts, start_worker
from worker.settings import WorkerSettings


def build_core(parts: WorkerParts) -> PrefillCore:
    config = parts.settings.worker
    memory = parts.runner.memory()
    source = HandoffSource(
        parts.pool,
        lease_s=config.lease_s,
        max_leases=config.max_leases,
        max_leased_blocks=max(1, int(parts.pool.num_blocks * config.max_leased_share)),
        follow_wait_s=config.follow_wait_s,
        digest=(lambda block: block_digest(memory, block)) if parts.settings.transport.digest else None,
    )
    return PrefillCore(parts.engine, source, report_every_s=config.report_every_s)


def metric_readers(core: PrefillCore) -> dict[str, Reader]:
    source = core.source
    return prefill_readers(lambda: source.active_leases, lambda: source.outcomes)


async def serve(settings: WorkerSettings, router_addresses: Callable[[], Iterable[str]] | None = None) -> RunningWorker:
    """`router_addresses` overrides the configured ones (deploy finds routers through Ray)."""
    return await start_worker("prefill", settings, build_core, metric_readers, router_addresses)
