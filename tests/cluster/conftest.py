"""Clusters that several files share, besides the one of tests/conftest.py. Each test leaves them whole and empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Cluster

# As the embedded model on a good core; 128 tokens of a prompt take an eighth of a second.
PACE = "25 0.75"
LIMITS = {"stall_s": 3.0, "transport_stall_s": 2.5}


@pytest.fixture(scope="session")
def restarting(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    """One prefill and one decode worker, and a router that may be stopped and started again."""
    directory = tmp_path_factory.mktemp("restarting")
    cluster = Cluster(
        directory,
        small_model,
        engine={"num_blocks": 256},
        transport={"ucx_net_devices": "lo"},
        pace=PACE,
        forked=True,
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def decode_only(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    """A router and one healthy decode worker, watched under limits so tight that a false alarm would show."""
    cluster = Cluster(
        tmp_path_factory.mktemp("decode-only"),
        small_model,
        prefill=0,
        engine={"num_blocks": 160, "max_batch_tokens": 128},
        transport={"ucx_net_devices": "lo"},
        worker=LIMITS,
        forked=True,
        pace="50 0.5",  # an answer of 90 tokens, and a prompt of 4,000, take longer than those limits
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()
