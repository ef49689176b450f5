"""One cluster with everything on: TLS inside and out, API keys, a cluster secret."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Cluster
from tests.support.secure import Secured


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Secured:
    return Secured(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, small_model: Path, secured: Secured) -> Iterator[Cluster]:
    admin = secured.add_key("operators", admin=True, max_priority=10)
    cluster = Cluster(
        tmp_path_factory.mktemp("secured"),
        small_model,
        engine={"num_blocks": 256},
        security={**secured.security, "limits": {"handshake_s": 2.0, "max_connections": 3000}},
        access=admin,
        pace="10 0.1",
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    yield shared
    shared.assert_nothing_left()
