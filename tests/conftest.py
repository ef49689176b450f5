from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.support.processes import Cluster

pytest_plugins = ["tests.support.tiers"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _no_gpu() -> bool:
    """Torch itself is asked last: it takes seconds to import, which tests without it need not spend."""
    if version("torch").endswith("+cpu"):
        return True
    import torch

    return not torch.cuda.is_available()


# Before anything imports triton, which reads it then (tests/support/triton_interpreter.py).
if _no_gpu():
    os.environ["TRITON_INTERPRET"] = "1"

# Timing never decides a test: without this, an example that takes 200 ms on a loaded machine fails.
hypothesis.settings.register_profile("diptych", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("diptych")


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The embedded model; fetched by `make test` before."""
    from settings.model_path import embedded_model_path

    path = embedded_model_path()
    assert (path / "config.json").exists(), f"no model at {path}; run `diptych model`"
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """In its place where the model is not what is tested: workers start sooner, and steps cost nothing."""
    from tests.support.checkpoints import small_model

    return small_model(tmp_path_factory.mktemp("small"), model_path)


@pytest.fixture(scope="session")
def tokenizer(model_path: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Cluster]:
    """One prefill and one decode worker in float32, digests on; every test leaves it empty."""
    from tests.support.processes import Cluster

    cluster = Cluster(
        tmp_path_factory.mktemp("cluster"),
        model_path,
        engine={"num_blocks": 512, "async_scheduling": "on"},  # the harder way; other clusters take the default
        transport={"digest": True, "ucx_net_devices": "lo"},
        router={"max_prompt_bytes": 4 << 20},
        forked=True,
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    yield shared
    shared.assert_nothing_left()
