"""The HTTP port on real sockets in this process, a fake worker behind it: no model, so text means nothing here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from router.config import HttpConfig, RouterConfig
from tests.support.in_process_router import InProcessRouter
from tests.support.raw_http import Http


@pytest.fixture(scope="session")
def running(model_path: Path) -> Iterator[InProcessRouter]:
    config = RouterConfig(
        model=str(model_path),
        grpc_port=0,
        http_port=0,
        internal_port=0,
        max_prompt_bytes=1 << 20,
        max_lag_tokens=2000,
        served_model_names=["small"],
        http=HttpConfig(max_header_bytes=4096, cors_origins=["https://pages.example"], allowed_hosts=["a", "x", "t"]),
    )
    router = InProcessRouter(config)
    try:
        yield router
    finally:
        router.close()


@pytest.fixture
def http(running: InProcessRouter) -> Iterator[Http]:
    """Every test leaves the router empty."""
    assert running.router.http is not None
    yield Http(running.router.http.port)
    running.becomes_empty()
