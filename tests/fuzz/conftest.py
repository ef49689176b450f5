from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from router.config import RouterConfig
from tests.support.in_process_router import InProcessRouter


@pytest.fixture(scope="session")
def router(model_path: Path) -> Iterator[InProcessRouter]:
    config = RouterConfig(
        model=str(model_path),
        grpc_port=0,
        http_port=0,
        internal_port=0,
        default_deadline_s=20.0,
        max_prompt_bytes=1 << 20,
    )
    running = InProcessRouter(config)
    try:
        yield running
    finally:
        running.close()
