"""Mixers of recurrent layers on the native kernels, over the whole packed row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from engine.attention.interface import ATTENTION_NAME, Chunk, StateUse, register
from engine.merged_linear import merge_projections
from engine.model_probe import probe_layers
from engine.native import recurrent
from engine.native.layers import use_native_layers
from engine.native.recurrent import Packed, pack_mixers
from engine.recurrent import Mixer, Recurrence, recurrence_of
from tests.model.test_families import SIZE
from tests.model.test_recurrent import FAMILIES, NOT_PACKED
from tests.support.native_levels import EVERY_LEVEL, library

KINDS = ["Qwen3Next", "KimiLinear", "Mamba2", "Jamba", "Lfm2"]  # one for each kernel, and for each kind of decay
BIT_BY_BIT = {"Mamba2", "Lfm2"}  # in the others torch computes something whose last bit depends on the number of rows
TOKENS = 41


def recurrence(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Recurrence]:
    torch.manual_seed(5)
    register()
    config = getattr(transformers, f"{family}Config")(**(SIZE | FAMILIES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 or "bias" in name:
            weight.data += torch.randn(weight.shape) * 0.1
    model.eval().requires_grad_(False)
    merge_projections(model)
    probe_layers(model, torch.device("cpu"), 256)
    found = recurrence_of(model)
    assert found is not None
    return model, found


def rows(mixer: Mixer, dtype: torch.dtype) -> tuple[str, torch.Tensor]:
    name, asked = next((n, v) for n, v in mixer.asked.items() if isinstance(v, torch.Tensor))
    x = torch.randn((1, TOKENS, *asked.shape[2:]), generator=torch.Generator().manual_seed(3)).to(dtype)
    return name, x


def in_steps(shared: Recurrence, mixer: Mixer, x: torch.Tensor, name: str, cuts: list[int]) -> torch.Tensor:
    """The mixer's answer to a prompt that is computed in pieces, beside another sequence."""
    pool = torch.full((4, shared.width), 255, dtype=torch.uint8)
    answers, start = [], 0
    for n, end in enumerate([*cuts, TOKENS]):
        source, target = ((0, 1), (1, 0))[n % 2]
        count = end - start
        chunks = [
            Chunk(0, 2, 0, [], (), StateUse(-1, 2)),
            Chunk(2, count, start, [], (), StateUse(source if n else -1, target)),
        ]
        both = torch.cat((x[:, :2], x[:, start:end]), dim=1)
        with torch.inference_mode(), shared.during([pool], chunks):
            answer = mixer.forward(**(mixer.asked | {name: both}))
        answers.append((answer[0] if isinstance(answer, tuple) else answer)[:, 2:])
        start = end
    return torch.cat(answers, dim=1)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NOT_PACKED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_mixers_run_on_kernels(family: str, dtype: torch.dtype) -> None:
    model, shared = recurrence(family, dtype)
    use_native_layers(model, library("vectors"))
    assert all(mixer.packed is not None for mixer in shared.mixers)


@pytest.mark.parametrize("family", KINDS)
@EVERY_LEVEL
def test_a_token_is_the_same_wherever_its_prompt_is_cut(isa: str, family: str) -> None:
    """And what the mixer's own code computes from the whole prompt, up to roundings."""
    model, shared = recurrence(family)
    mixer = shared.mixers[0]
    name, x = rows(mixer, torch.float32)
    whole = in_steps(shared, mixer, x, name, [])
    use_native_layers(model, library(isa))
    assert mixer.packed is not None
    found = [in_steps(shared, mixer, x, name, cuts) for cuts in ([], [1, 2, 9], [30], list(range(20, TOKENS)))]
    for other in found[1:]:
        if family in BIT_BY_BIT:
            assert torch.equal(found[0], other)
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-6 * whole.std().item())
    torch.testing.assert_close(found[0], whole, rtol=1e-3, atol=1e-4 * whole.std().item())


def forgetting(own: Callable[..., Any]) -> Callable[..., Any]:
    """Every sequence begins with nothing."""

    def wrong(self: Packed, *args: Any, **kwargs: Any) -> Any:
        step = self._step
        assert step is not None
        before = step.runs.copy()
        step.runs[:, 2] = -1
        try:
            return own(self, *args, **kwargs)
        finally:
            step.runs[:] = before

    return wrong


def without(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def planted(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: own(self, *args, **(kwargs | {name: None}))

    return planted


@pytest.mark.parametrize(
    ("family", "name", "planted"),
    [
        ("Qwen3Next", "torch_chunk_gated_delta_rule", forgetting),
        ("Qwen3Next", "torch_chunk_gated_delta_rule", without("use_qk_l2norm_in_kernel")),
        ("Mamba2", "mamba2_chunk_scan", without("D")),
        ("Mamba2", "mamba2_chunk_scan", without("dt_bias")),
        ("Jamba", "mamba_selective_scan", without("z")),
        ("Lfm2", "causal_conv1d_fn", forgetting),
    ],
)
def test_what_computes_something_else_keeps_its_own_way(
    monkeypatch: pytest.MonkeyPatch, family: str, name: str, planted: Callable[..., Any]
) -> None:
    _, shared = recurrence(family)
    kind, own = recurrent.FUNCTIONS[name]
    monkeypatch.setitem(recurrent.FUNCTIONS, name, (kind, planted(own)))
    assert pack_mixers(shared, library("vectors")) == 0
    assert all(mixer.packed is None for mixer in shared.mixers)
