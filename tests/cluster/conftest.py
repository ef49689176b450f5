from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Cluster


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Cluster]:
    """One prefill and one decode worker in float32, digests on; every test leaves it empty."""
    cluster = Cluster(
        tmp_path_factory.mktemp("cluster"),
        model_path,
        engine={"num_blocks": 512},
        transport={"digest": True, "ucx_net_devices": "lo"},
        router={"max_prompt_bytes": 4 << 20},
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    yield shared
    shared.assert_nothing_left()
