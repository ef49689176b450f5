"""Builds the two ends of KV exchange from a worker's parts: any worker may lend and fetch."""

from __future__ import annotations

import itertools

from kv_transfer.nixl_agent import LANE_SLOTS
from kv_transfer.paths import PathMonitor
from kv_transfer.reader import HandoffReader
from kv_transfer.source import HandoffSource
from kv_transfer.transport_inprocess import block_digest
from worker.server import WorkerParts

_PULL_BYTES = 8 << 20  # a transfer over shared memory copies inside one call: keep calls short


def build_source(parts: WorkerParts) -> HandoffSource:
    config = parts.settings.worker
    memory = parts.runner.memory()
    return HandoffSource(
        parts.pool,
        lease_s=config.lease_s,
        max_leases=config.max_leases,
        max_leased_blocks=max(1, int(sum(parts.pool.blocks_by_group) * config.max_leased_share)),
        follow_wait_s=config.follow_wait_s,
        digest=(lambda block: block_digest(memory, block)) if parts.settings.transport.digest else None,
        find=parts.pool.match if parts.engine.groups.alone else None,
        block_tokens=parts.engine.limits.block_tokens,
    )


def build_reader(parts: WorkerParts, numbers: itertools.count[int], paths: PathMonitor | None) -> HandoffReader:
    """`numbers` are shared with what else submits pulls."""
    config, transport = parts.settings.worker, parts.settings.transport
    size = parts.settings.engine.block_tokens
    block_bytes = [group.block_bytes(size) for group in parts.runner.facts.groups]  # of all ranks together
    return HandoffReader(
        parts.pool,
        parts.transport.submit,
        parts.transport.abandon,
        block_bytes=block_bytes,
        pull_timeout_s=transport.pull_timeout_s,
        announce_timeout_s=config.announce_timeout_s,
        renew_every_s=config.lease_s / 3,
        max_blocks_per_pull=[
            min(config.max_blocks_per_pull, max(1, _PULL_BYTES // size), LANE_SLOTS) for size in block_bytes
        ],
        max_quarantined_blocks=int(sum(parts.pool.blocks_by_group) * config.max_quarantined_share),
        numbers=numbers,
        observe=paths.observe if paths is not None else None,
    )
