"""Experts of mixtures with rounded weights: what is computed, what computes it, and what it takes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.experts.parts import ExpertsModule, experts_of
from engine.kept import FP8
from engine.model_loader import ModelLoadError
from engine.native.experts import NativeExperts
from engine.quantization import Quantized, Scheme, quantize, scheme_of
from engine.runner import ModelRunner
from engine.types import SamplingParams, SequenceSpec
from tests.model.test_experts import model_of, routed
from tests.model.test_quantization import greedy, runner_of
from tests.support.families import saved_family
from tests.support.native_levels import EVERY_LEVEL, library
from tests.support.plain_engine import Engine, some_prompts
from tests.support.rounded import model_with_rounded_weights, round_weights
from tests.support.tiers import tiered

WIDE: dict[str, Any] = {"hidden_size": 160}  # no whole groups, nor are the experts' 200 columns
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": WIDE | {"intermediate_size": 200},
    "qwen3_moe": WIDE | {"moe_intermediate_size": 200},
    "gpt_oss": WIDE | {"intermediate_size": 200},
    "deepseek_v3": WIDE | {"moe_intermediate_size": 200},
}


def answers_of(runner: ModelRunner, prompts: dict[int, list[int]]) -> dict[int, list[int]]:
    engine = Engine(runner)
    for n, prompt in prompts.items():
        assert engine.core.add(SequenceSpec(n, prompt, SamplingParams(max_tokens=6)), 0.0) is None
    engine.run()
    return engine.answers


@pytest.mark.parametrize(
    ("family", "kernels", "quantization", "groups"),
    tiered(
        [
            ("mixtral", "auto", "int8", ("mlp",)),
            ("qwen3_moe", "auto", "int4", ("experts",)),
            ("gpt_oss", "auto", "int4", ("attention", "mlp")),
            ("deepseek_v3", "auto", "int8", ("mlp",)),
            ("gpt_oss", "torch", "int8", ("mlp",)),
        ],
        [("deepseek_v3", "auto", "int4", ("experts", "head")), ("mixtral", "auto", "fp8", ("mlp",))],
    ),
)
def test_answers_are_those_of_the_rounded_weights(
    tmp_path: Path, family: str, kernels: str, quantization: str, groups: tuple[str, ...]
) -> None:
    path = saved_family(tmp_path, family, SIZES[family])
    before = {file: file.read_bytes() for file in path.iterdir()}
    runner = runner_of(path, kernels=kernels, quantization=quantization, quantized_groups=groups)
    right = model_with_rounded_weights(path, quantization, groups)
    prompts = some_prompts(1, 7, 30)
    answers = answers_of(runner, prompts)
    for n, prompt in prompts.items():
        assert answers[n] == greedy(right, prompt, 6), n
    expanded = ", expanded" if kernels == "torch" else ""
    assert runner.describe_path().endswith(f", {quantization} {'+'.join(groups)} weights{expanded}")
    assert runner._quantized is not None
    rounded_experts = [p for p in runner._quantized.paths if ".experts." in p]
    assert len(rounded_experts) == 2 * (1 if family == "deepseek_v3" else 2), "of both products, in each such layer"
    assert before == {file: file.read_bytes() for file in path.iterdir()}, "rounded in the checkpoint"


def weight_bytes_alive() -> int:
    """Of everything that torch keeps in this process."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if issubclass(type(t), torch.Tensor) and t.device.type == "cpu"
    }
    return sum(storages.values())


@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.51), ("int4", 0.27)])
def test_the_memory_is_given_back(tmp_path: Path, quantization: str, share: float) -> None:
    """In bfloat16, against the same model as it is."""
    path = saved_family(tmp_path, "qwen3_moe", {"hidden_size": 256, "moe_intermediate_size": 512})
    experts = 2 * 4 * 3 * 256 * 512 * 2  # bytes: layers, experts, matrices
    before = weight_bytes_alive()
    plain = runner_of(path, dtype="bfloat16")
    as_it_is = weight_bytes_alive() - before
    assert as_it_is > experts
    del plain
    before = weight_bytes_alive()
    rounded = runner_of(path, dtype="bfloat16", quantization=quantization, quantized_groups=("experts",))
    saved = as_it_is - (weight_bytes_alive() - before)
    assert saved >= (1 - share) * experts
    assert rounded.describe_path().endswith(f"{quantization} experts weights")


def one(family: str, bits: int, *dtypes: torch.dtype) -> tuple[ExpertsModule, Quantized]:
    """Of weights that all `dtypes` have, in the last."""
    model = model_of(family, WIDE | {"moe_intermediate_size": 200, "intermediate_size": 200})
    for dtype in dtypes:
        model = model.to(dtype)
    found = quantize(model, Scheme(bits, ("experts",)))
    return next(experts_of(model)), found


@pytest.mark.parametrize("bits", [8, 4, FP8])
@pytest.mark.parametrize("family", ["GptOss", "Gemma4Text"])
@EVERY_LEVEL
def test_kernels_multiply_with_the_small_numbers(isa: str, family: str, bits: int) -> None:
    """A gate of torch's, and one in turn with biases; any number of rows, each as it is alone; a choice of nobody."""
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        experts, small = one(family, bits, dtype)
        native = NativeExperts(library(isa), experts, small.alike(experts.paths))
        exact, _ = one(family, bits, dtype, torch.float32)
        for rows in (1, 5, 40):
            x = torch.randn(rows, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
            chosen, weights = routed(experts.count, rows, 2, nowhere=True)
            there = chosen < experts.count
            right = exact.alone(x.float(), chosen.clamp(max=experts.count - 1), weights * there)
            made = native(x, chosen, weights)
            off = (made.float() - right).square().mean(-1).sqrt().max()
            assert off <= limit * right.square().mean(-1).sqrt().max()
            assert torch.equal(made[-1:], native(x[-1:], chosen[-1:], weights[-1:])), "a row depends on others"


def test_experts_are_of_the_feed_forward_blocks(tmp_path: Path) -> None:
    """So both names together are one, in settings, identity and for whoever compares."""
    path = saved_family(tmp_path, "qwen3_moe", SIZES["qwen3_moe"])
    assert scheme_of("int8", ("mlp", "experts", "head")) == scheme_of("int8", ("head", "mlp"))
    assert EngineConfig(quantized_groups=("experts", "mlp")).quantized_groups == ("mlp",)
    named: list[tuple[str, ...]] = [("mlp",), ("mlp", "experts"), ("experts",)]
    facts = [runner_of(path, kernels="torch", quantization="int8", quantized_groups=g).facts for g in named]
    assert facts[0] == facts[1]
    assert facts[2].identity != facts[0].identity
    assert [f.weights for f in facts] == ["int8 mlp", "int8 mlp", "int8 experts"]


def test_shared_experts_and_dense_layers_are_of_mlp_alone() -> None:
    model = model_of("DeepseekV3", {"first_k_dense_replace": 1, "hidden_size": 160})
    paths = {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
    assert quantize(model, Scheme(8, ("experts",))).paths == paths
    beside = {f"layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    beside |= {f"layers.1.mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    model = model_of("DeepseekV3", {"first_k_dense_replace": 1, "hidden_size": 160})
    assert quantize(model, Scheme(8, ("mlp",))).paths == paths | {f"model.{name}" for name in beside}


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "DeepseekV3", "Llama4Text", "Olmoe", "Gemma4Text"])
def test_the_model_has_the_rounded_weights(family: str) -> None:
    """However its experts lie in memory; routers stay as they are."""
    wide = WIDE | {"moe_intermediate_size": 200, "intermediate_size": 200}
    model, by_hand = model_of(family, wide), round_weights(model_of(family, wide), "int4", ("experts",))
    quantize(model, Scheme(4, ("experts",)))
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_number_that_is_none_is_named() -> None:
    model = model_of("Mixtral")
    next(experts_of(model)).down[2, 3, 4] = float("inf")
    with pytest.raises(ModelLoadError, match=r"layers\.0\.mlp\.experts\.down_proj, expert 2, has elements"):
        quantize(model, Scheme(4, ("mlp",)))


DBRX = {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("family", "changes", "groups", "words"),
    [
        ("llama", {}, ("experts",), "it has no experts; set .*engine.quantized_groups to other"),
        ("dbrx", DBRX, ("mlp",), r"ffn\.experts has experts of a class that is not known here \(DbrxExperts\)"),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], groups: tuple[str, ...], words: str
) -> None:
    path = saved_family(tmp_path, family, changes)
    with pytest.raises(ModelLoadError, match=words):
        runner_of(path, quantization="int8", quantized_groups=groups)
