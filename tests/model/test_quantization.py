"""Quantized weights: what is computed is the model whose weights are the rounded ones, whatever computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.config import EngineConfig
from engine.kept import FP8, GROUP, WIDE_SCALES, are_floats, group_columns, number_bits, of_groups, words
from engine.merged_linear import merge_projections
from engine.model_loader import ModelLoadError
from engine.native.layers import NativeProduct, use_native_layers
from engine.native.quantized import pack_in_turn, panels_of, room_of
from engine.quantization import Scheme, dequantized, numbers, quantize, scales_of, scheme_of
from engine.runner import ModelRunner
from engine.types import SamplingParams, SequenceSpec
from kv_transfer.layout import KvLayout
from tests.model.test_families import saved
from tests.model.test_native_layers import logits, model_of
from tests.support.native_levels import EVERY_LEVEL, library
from tests.support.plain_engine import Engine, some_prompts
from tests.support.prompts import clear_choice
from tests.support.rounded import model_with_rounded_weights

BLOCK = 8
WIDE: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 200, "head_dim": 40}  # no whole groups
EVERYTHING = ("attention", "head", "mlp")


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(clear_choice(model(torch.tensor([ids])).logits[0, -1]))
    return ids[len(prompt) :]


def runner_of(path: Path, **settings: Any) -> ModelRunner:
    small = {"model": str(path), "dtype": "float32", "num_blocks": 48, "block_tokens": BLOCK, "threads": 1}
    return ModelRunner(EngineConfig.model_validate({**small, "device": "cpu", **settings}))


@pytest.mark.parametrize(
    ("family", "changes", "kernels", "quantization", "groups"),
    [
        ("Llama", WIDE, "torch", "int8", ("mlp",)),
        ("Llama", WIDE | {"tie_word_embeddings": True}, "torch", "int4", EVERYTHING),
        ("Llama", WIDE | {"tie_word_embeddings": True}, "auto", "int8", EVERYTHING),
        ("Qwen2", WIDE, "auto", "int4", ("mlp",)),
        ("Llama", WIDE | {"tie_word_embeddings": True}, "auto", "fp8", EVERYTHING),
        ("Gemma", {"head_dim": 32}, "torch", "fp8", ("mlp",)),
        ("Qwen3", WIDE, "auto", "int4", ("attention", "mlp")),
        ("Gemma", {"head_dim": 32}, "auto", "int8", ("attention", "mlp")),
    ],
)
def test_answers_are_those_of_the_rounded_weights(
    tmp_path: Path, family: str, changes: dict[str, Any], kernels: str, quantization: str, groups: tuple[str, ...]
) -> None:
    path = saved(tmp_path, family, **changes)
    runner = runner_of(path, kernels=kernels, quantization=quantization, quantized_groups=groups)
    right = model_with_rounded_weights(path, quantization, groups)
    engine = Engine(runner)
    for n, prompt in some_prompts(1, 7, 30).items():
        assert engine.core.add(SequenceSpec(n, prompt, SamplingParams(max_tokens=6)), 0.0) is None
    engine.run()
    for n, prompt in some_prompts(1, 7, 30).items():
        assert engine.answers[n] == greedy(right, prompt, 6), n
    expanded = ", expanded" if kernels == "torch" else ""
    assert runner.describe_path().endswith(f", {quantization} {'+'.join(groups)} weights{expanded}")
    assert runner._quantized is not None
    assert not runner._quantized.scales, "held beside those that are packed"


def test_split_is_local(tmp_path: Path) -> None:
    """What a handoff does, without the network: blocks of one engine go on in another."""
    path, prompt = saved(tmp_path, "Llama", **WIDE), some_prompts(1, 7, 30)[30]
    settings = {"quantization": "int4", "quantized_groups": EVERYTHING}
    prefill, decode = Engine(runner_of(path, **settings)), Engine(runner_of(path, **settings))
    assert prefill.runner.facts == decode.runner.facts
    sampling = SamplingParams(max_tokens=8)
    assert prefill.core.add(SequenceSpec(1, prompt, sampling, hand_over=True, retain=True), 0.0) is None
    prefill.run()
    assert decode.core.add(SequenceSpec(1, prompt, sampling, hold=True), 0.0) is None
    room = decode.core.reserve(1, len(prompt), 0.0)
    assert room is not None
    for source, target in zip(prefill.core.block_table(1), room.block_ids, strict=True):
        decode.runner.kv[target] = prefill.runner.kv[source]
    decode.answers[1] = list(prefill.answers[1])
    decode.core.adopt(1, len(prompt), decode.answers[1], 0.0)
    decode.run()
    assert decode.answers[1] == greedy(model_with_rounded_weights(path, "int4", EVERYTHING), prompt, 8)


def test_each_scheme_is_a_model_of_its_own(tmp_path: Path) -> None:
    """So blocks of one are never found, read or moved by another."""
    path = saved(tmp_path, "Llama")
    settings: list[dict[str, Any]] = [
        {},
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"quantization": "fp8"},
        {"quantization": "int4", "quantized_groups": ("mlp", "attention")},
    ]
    facts = [runner_of(path, kernels="torch", **s).facts for s in settings]
    assert [f.weights for f in facts] == ["", "int8 mlp", "int4 mlp", "fp8 mlp", "int4 attention+mlp"]
    assert len({f.identity for f in facts}) == len(facts)
    layouts = [KvLayout(f.identity, BLOCK, f.groups, f.weights).fingerprint() for f in facts]
    assert len(set(layouts)) == len(layouts)
    assert "-int4.attention+mlp-" in layouts[-1]
    assert facts[0] == runner_of(path, kernels="torch", quantized_groups=("head",)).facts, "groups of no scheme"


def test_the_order_of_groups_says_nothing() -> None:
    assert scheme_of("int8", ("mlp", "head", "mlp")) == scheme_of("int8", ("head", "mlp")) == Scheme(8, ("head", "mlp"))
    assert scheme_of("none", ("mlp",)) is None


EVERY_NUMBER = pytest.mark.parametrize("bits", [8, 4, FP8], ids=["int8", "int4", "fp8"])


@EVERY_NUMBER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_found_again_in_what_they_stand_for(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 3 * GROUP + 5, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[3] = 0
    weight[4, 7] = 50  # alone in its group: the others become zero
    weight = weight.to(dtype)
    scheme = Scheme(bits, ("mlp",))
    scales = scales_of(weight, scheme)
    first = numbers(weight, scales, bits)
    assert first.float().abs().max() == scheme.most
    assert torch.equal(scales, scales.bfloat16().float())
    assert torch.equal(numbers(dequantized(first, scales, bits).to(dtype), scales, bits).float(), first.float())
    near = (dequantized(first, scales, bits) - weight.float()).abs()
    steps = scales.repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    if bits == FP8:  # of the number's own size: half of the last of three places, and what a rounded scale takes
        steps = steps * (first.float().abs() / 8).clamp(min=2.0**-9)
    assert bool((near <= steps * 0.76).all())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("largest", [9.6e-40, 6e-38])
def test_a_group_too_small_for_its_scale_is_zero(bits: int, largest: float) -> None:
    """A denormal scale is rounded so far that a number would have no place in its bits."""
    scheme = Scheme(bits, ("mlp",))
    weight = torch.randn(33, GROUP + 40, generator=torch.Generator().manual_seed(1))
    others = weight.clone()
    weight[0, :GROUP] = torch.linspace(-largest, largest, GROUP)
    others[0, :GROUP] = 0
    scales = scales_of(weight, scheme)
    assert scales[0, 0] == 1
    assert torch.equal(scales, scales_of(others, scheme))
    assert torch.equal(numbers(weight, scales, bits), numbers(others, scales, bits))
    least = torch.finfo(torch.bfloat16).tiny
    weight[0, :GROUP] *= least * scheme.most / largest
    scales = scales_of(weight, scheme)
    assert scales[0, 0] == least
    assert numbers(weight, scales, bits).abs().max() == scheme.most


@EVERY_NUMBER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_rows_are_what_the_whole_is(monkeypatch: pytest.MonkeyPatch, bits: int, dtype: torch.dtype) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Linear(2 * GROUP + 45, 2 * 256 + 77, bias=False, dtype=dtype).requires_grad_(False)

    def made() -> tuple[torch.Tensor, ...]:
        layer = Tiny()
        layer.up_proj.weight.copy_(weight)
        scales = quantize(layer, scheme).scales["up_proj"]
        rounded_weight = layer.up_proj.weight
        small = numbers(rounded_weight, scales, bits)
        both = [(rounded_weight, scales), (rounded_weight.flip(0), scales.flip(0))]
        out = torch.zeros(room_of(bits, *both), dtype=torch.uint8)
        pack_in_turn(bits, out, *both)
        in_turn = torch.stack([panels_of(numbers(w, s, bits), s, bits) for w, s in both], dim=1)
        assert torch.equal(out, in_turn)
        return scales, small.float(), dequantized(small, scales, bits), rounded_weight, out

    scheme = Scheme(bits, ("mlp",))
    weight = torch.randn(2 * 256 + 77, 2 * GROUP + 45, generator=torch.Generator().manual_seed(1)).to(dtype)
    in_pieces = made()
    monkeypatch.setattr("engine.quantization._PIECE", 10_000)
    for one, other in zip(in_pieces, made(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    filled = nn.functional.pad(weight.float(), (0, GROUP - 45)).unflatten(1, (-1, GROUP))
    scales = (filled.abs().amax(-1) / scheme.most).bfloat16().float()
    small = (filled / scales[..., None]).clamp(-scheme.most, scheme.most)
    small = small.to(torch.float8_e4m3fn).float() if bits == FP8 else small.round()
    whole = (small * scales[..., None]).flatten(1)[:, : weight.shape[1]]
    assert torch.equal(in_pieces[0], scales)
    assert torch.equal(in_pieces[2], whole)
    assert torch.equal(in_pieces[3], whole.to(dtype))


@pytest.mark.parametrize(
    ("family", "changes", "groups", "words"),
    [
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, ("mlp",), "known as mlp"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], groups: tuple[str, ...], words: str
) -> None:
    path = saved(tmp_path, family, **changes)
    with pytest.raises(ModelLoadError, match=words):
        runner_of(path, quantization="int8", quantized_groups=groups)


def test_a_weight_that_is_no_number_is_named() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Linear(4, 4).requires_grad_(False)

    model = Tiny()
    model.up_proj.weight[1, 2] = float("nan")
    with pytest.raises(ModelLoadError, match=r"up_proj\.weight has elements that are no finite numbers"):
        quantize(model, Scheme(8, ("mlp",)))


def test_the_head_is_refused_over_several_ranks() -> None:
    with pytest.raises(ValueError, match="the head is not quantized over several ranks"):
        EngineConfig(tensor_parallel=2, quantization="int8", quantized_groups=("head", "mlp"))


def every_number(bits: int, columns: int, inner: int, generator: torch.Generator) -> torch.Tensor:
    """Also -8 and -128, denormal ones of E4M3, and both of its zeros."""
    if are_floats(bits):
        made = torch.randint(0, 256, (columns, inner), generator=generator)
        return made.where(made & 127 != 127, made - 1).to(torch.uint8).view(torch.float8_e4m3fn)
    end = 1 << (number_bits(bits) - 1)
    return torch.randint(-end, end, (columns, inner), generator=generator).to(torch.int8)


@pytest.mark.parametrize(
    "bits",
    [8, 4, FP8, FP8 | WIDE_SCALES, of_groups(4, 32) | WIDE_SCALES, of_groups(8, 64)],
    ids=lambda bits: f"{bits:#x}",
)
@EVERY_LEVEL
def test_kernels_multiply_with_the_small_numbers(isa: str, bits: int) -> None:
    """Any number of rows, a row alone as beside others, widths that fill no group, block or panel."""
    generator = torch.Generator().manual_seed(1)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for columns, inner in ((50, 70), (96, 3 * GROUP + 64)):
            small = every_number(bits, columns, inner, generator)
            scales = torch.rand(columns, -(-inner // group_columns(bits)), generator=generator) + 0.1
            scales = scales if bits & WIDE_SCALES else scales.bfloat16().float()
            exact = dequantized(small, scales, bits)
            bias = torch.randn(columns, generator=generator).to(dtype)
            product = NativeProduct(library(isa), exact.to(dtype), bias, scales, bits)
            x = torch.randn(600, inner, generator=generator).to(dtype)
            right = nn.functional.linear(x.double(), exact.double(), bias.double())
            for rows in (1, 2, 3, 6, 8, 33, 600):
                made = product(x[:rows])
                off = (made.double() - right[:rows]).abs().max() / right.abs().max()
                assert off <= allowed, (dtype, columns, rows)
                assert torch.equal(made[:1], product(x[:1])), "a row depends on those beside it"


@pytest.mark.parametrize(("family", "bits"), [("Llama", 8), ("Llama", FP8), ("Phi3", 4), ("Phi3", FP8), ("Gemma2", 4)])
def test_layers_keep_the_small_numbers(family: str, bits: int) -> None:
    """Of models that do not run as a whole; blocks with all gates first, merged projections, biases."""
    model = model_of(family)
    groups = ("mlp",) if family == "Phi3" else ("attention", "mlp")
    found = quantize(model, Scheme(bits, groups))
    right = logits(model)
    merge_projections(model)
    use_native_layers(model, library("vectors"))
    torch.testing.assert_close(logits(model), right, rtol=1e-4, atol=1e-4)
    assert found.kept == found.scales.keys()
    assert str(found) == f"{words(bits)} {'+'.join(groups)} weights"
