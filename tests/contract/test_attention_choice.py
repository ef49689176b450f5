"""Which attention backend starts, and what happens when Triton does not do what it should."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine.attention import choose
from engine.attention.choose import (
    LIBRARIES,
    AttentionChoiceError,
    AttentionShape,
    obstacle_to,
    pick_backend,
    trial_of_attention,
)
from engine.attention.gather import GatherBackend
from engine.attention.interface import Chunk, ExtrasUsed, StepBatch
from engine.config import EngineConfig
from kv_transfer.layout import FULL, Rule
from tests.support import attention_libraries
from tests.support.triton_interpreter import ON_GPU

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = AttentionShape(heads=6, kv_heads=2, head_dim=64, block_tokens=8, dtype=torch.float32)


class Off:
    """Gather, off by a little; or not there at all."""

    name = "off"

    def __init__(self, by: float = 0.0, error: Exception | None = None) -> None:
        self._by, self._error = by, error

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> StepBatch:
        if self._error is not None:
            raise self._error
        batch, by = GatherBackend().prepare(kv, chunks, rule), self._by

        class Batch:
            def attend(self, *args: Any) -> torch.Tensor:
                return batch.attend(*args) + by

        return Batch()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CUDA device as far as the choice looks; the trial itself runs on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        choose, "trial_of_attention", lambda backend, device, shape: trial_of_attention(backend, CPU, shape)
    )
    return monkeypatch


def test_cpu_runs_gather() -> None:
    assert pick_backend("auto", CPU, SHAPE).name == "torch gather + sdpa"
    with pytest.raises(AttentionChoiceError, match="the device is not CUDA; use auto or gather"):
        pick_backend("triton", CPU, SHAPE)


@pytest.mark.parametrize("wanted", ["auto", "triton"])
@pytest.mark.skipif(ON_GPU, reason="needs the interpreter: tries kernels on the CPU")
def test_cuda_runs_triton_after_a_trial(cuda: pytest.MonkeyPatch, wanted: Any) -> None:
    assert pick_backend(wanted, CUDA, SHAPE).name == "triton paged"
    assert pick_backend("gather", CUDA, SHAPE).name == "torch gather + sdpa"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Off(by=0.01), "differs from gather by 0.01"),
        (Off(by=float("nan")), "differs from gather by nan"),
        (Off(error=RuntimeError("Failed to find C compiler")), "Failed to find C compiler"),
    ],
)
def test_a_failed_trial_means_gather_and_a_warning(
    cuda: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: Off, reason: str
) -> None:
    cuda.setattr(choose, "load", lambda name: broken)
    with caplog.at_level(logging.WARNING):
        assert pick_backend("auto", CUDA, SHAPE).name == "torch gather + sdpa"
    assert reason in caplog.text
    with pytest.raises(AttentionChoiceError, match=reason):
        pick_backend("triton", CUDA, SHAPE)


HALF = replace(SHAPE, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_is_known_before_trying(name: str) -> None:
    fits = replace(HALF, block_tokens=256)
    assert obstacle_to(name, (8, 0), fits, installed=True) is None
    assert obstacle_to(name, (9, 0), fits, installed=False) == f"{name} is not installed"
    assert "capability 7.5" in str(obstacle_to(name, (7, 5), fits, installed=True))
    assert "head_dim is 512" in str(obstacle_to(name, (9, 0), replace(fits, head_dim=512), installed=True))
    assert "not CUDA" in str(obstacle_to(name, None, fits, installed=True))


def test_what_libraries_cannot_serve_is_known_before_trying() -> None:
    assert obstacle_to("triton", (9, 0), SHAPE, installed=True) is None
    assert "not float32" in str(obstacle_to("flashinfer", (9, 0), SHAPE, installed=True))
    assert obstacle_to("flashinfer", (9, 0), HALF, installed=True) is None
    assert "multiple of 256 tokens" in str(obstacle_to("flash_attn", (9, 0), HALF, installed=True))


@pytest.mark.parametrize("name", LIBRARIES)
def test_rules_and_extras_are_known_before_trying(name: str) -> None:
    """Triton serves them all; libraries what their interfaces take plainly."""

    def obstacle(rule: Rule = FULL, head_dim: int = 64, **extras: bool) -> str | None:
        shape = replace(HALF, block_tokens=256, rule=rule, head_dim=head_dim, extras=ExtrasUsed(**extras))
        return obstacle_to(name, (9, 0), shape, installed=True)

    assert obstacle(Rule(window=100), softcap=True) is None
    asked = {
        "chunk(100)": obstacle(Rule(chunk=100)),
        "latent full": obstacle(Rule(values=512), head_dim=576),
        "sinks": obstacle(sinks=True),
    }
    for what, why in asked.items():
        assert why is None if name == "triton" else what in str(why)
    assert "head_dim is 704" in str(obstacle(Rule(values=512), head_dim=704))


def test_auto_goes_through_the_libraries_in_order(cuda: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Triton fails here, FlashInfer serves: nothing is said, and status names it."""
    from engine.attention.flashinfer_paged import FlashInferBackend

    cuda.setattr(choose, "find_spec", lambda name: name in LIBRARIES[:2] or None)
    made = {"triton": lambda: Off(by=1.0), "flashinfer": lambda: FlashInferBackend(attention_libraries)}
    cuda.setattr(choose, "load", lambda name: made[name]())
    with caplog.at_level(logging.WARNING):
        assert pick_backend("auto", CUDA, HALF).name == "flashinfer"
        assert pick_backend("flashinfer", CUDA, HALF).name == "flashinfer"
    assert not caplog.text
    with pytest.raises(AttentionChoiceError, match="flash_attn, and flash_attn is not installed; use auto or gather"):
        pick_backend("flash_attn", CUDA, HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_tokens", [1, 16])
def test_gather_passes_its_own_trial(dtype: torch.dtype, block_tokens: int) -> None:
    assert trial_of_attention(GatherBackend(), CPU, AttentionShape(6, 2, 80, block_tokens, dtype)) is None


def test_configuration_names_the_backends() -> None:
    assert EngineConfig().attention == "auto"
    with pytest.raises(ValidationError, match="'triton', 'flashinfer' or 'flash_attn'"):
        EngineConfig(attention="flash")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="attention of its own"):
        EngineConfig(attention="triton", batch_invariant=True)
