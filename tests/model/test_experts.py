"""Experts as we compute them beside transformers' own loop, family by family, on tiny random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.experts.choose import EXPERTS_NAME, PLAIN, group_experts
from engine.experts.grouped import TorchExperts
from engine.experts.parts import ExpertsModule, experts_of
from engine.native.experts import NativeExperts
from engine.native.library import load_library
from tests.support.native_levels import EVERY_LEVEL, library

SIZE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 24, "first_k_dense_replace": 0, "norm_topk_prob": True, "routed_scaling_factor": 1.7,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
MANY = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": MANY | {"head_dim": 16, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "Qwen2Moe": MANY | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16},
    "DeepseekV3": GROUPED | LATENT,
    "Glm4Moe": GROUPED | {"head_dim": 16},
    "Dots1": GROUPED | {"head_dim": 16},
    "Llama4Text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "head_dim": 16,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 64,
    },
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "MiniMaxM2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "Ernie4_5_Moe": {
        "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0, "head_dim": 16,
        "moe_num_shared_experts": 1,
    },
    "Lfm2Moe": MANY | {"num_dense_layers": 0, "layer_types": ["full_attention"] * 2},
    "Gemma4Text": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24, "head_dim": 16,
        "global_head_dim": 16, "hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 2,
    },
}  # fmt: skip
TORCH_GATES = {"Gemma4Text"}  # a gate that no kernel computes


def model_of(family: str, changes: dict[str, Any] | None = None) -> Any:
    """Biases and corrections are not zero: what forgets them differs."""
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**(SIZE | FAMILIES[family] | (changes or {})))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation=PLAIN)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and "inv_freq" not in name and "norm" not in name and "scal" not in name:
            torch.nn.init.normal_(tensor.data, std=0.2)
    return model.eval().requires_grad_(False)


TOKENS = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS, use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@EVERY_LEVEL
def test_native_experts_are_the_models_own(isa: str, family: str) -> None:
    model = model_of(family)
    layers = list(experts_of(model))
    assert layers, "no experts were found"
    size = sum(p.numel() for e in layers for p in e.module.parameters())
    right = logits(model)
    load = group_experts(model, library(isa))
    assert {e.module.diptych_experts.name for e in layers} == {f"native ({isa})"}
    assert all(e.module.diptych_experts._whole == (family not in TORCH_GATES) for e in layers)
    torch.testing.assert_close(logits(model), right, rtol=1e-4, atol=1e-4)
    assert load is not None
    assert load.routed() == 40 * len(layers) * choices(family)
    assert sum(p.numel() for e in layers for p in e.module.parameters()) == 0 < size, "held twice"


def choices(family: str) -> int:
    wanted = FAMILIES[family]
    return next(wanted[name] for name in ("num_experts_per_tok", "moe_k", "top_k_experts") if name in wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_torch_are_the_models_own(family: str) -> None:
    model = model_of(family)
    right = logits(model)
    load = group_experts(model, None)
    assert {type(e.module.diptych_experts) for e in experts_of(model)} == {TorchExperts}
    torch.testing.assert_close(logits(model), right, rtol=1e-4, atol=1e-4)
    assert load is not None
    assert load.routed() == 40 * len(list(experts_of(model))) * choices(family)


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss", "DeepseekV3", "Llama4Text"])
def test_experts_with_equal_scores_are_chosen_alike(family: str) -> None:
    """A router of zeros: every score is equal, and which experts win is transformers' own choice."""
    model = model_of(family)
    for name, tensor in model.named_parameters():
        if any(part in name for part in ("router.", ".mlp.gate.", "feed_forward.gate")):
            tensor.zero_()
    right = logits(model)
    group_experts(model, load_library(2))
    torch.testing.assert_close(logits(model), right, rtol=1e-4, atol=1e-4)


def one(family: str, dtype: torch.dtype) -> ExpertsModule:
    model = model_of(family).to(dtype)
    return next(experts_of(model))


def routed(count: int, rows: int, choices: int, *, nowhere: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    chosen = torch.rand(rows, count, generator=generator).topk(choices).indices
    chosen[:, 0] = 1  # one has every row, and with few rows most have none
    if nowhere:
        chosen[::3, -1] = count
    return chosen, torch.rand(rows, choices, generator=generator)


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 33, 130])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "Gemma4Text"])
@EVERY_LEVEL
def test_any_number_of_rows(isa: str, family: str, rows: int) -> None:
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        experts = one(family, dtype)
        x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
        chosen, weights = routed(experts.count, rows, 2)
        right = one(family, torch.float32).alone(x.float(), chosen, weights)
        ours = NativeExperts(library(isa), experts)(x, chosen, weights).float()
        assert (ours - right).square().mean(-1).sqrt().max() <= limit * right.square().mean(-1).sqrt().max()


@EVERY_LEVEL
def test_experts_without_a_gate(isa: str) -> None:
    import transformers
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    torch.manual_seed(5)
    config = transformers.NemotronHConfig(
        n_routed_experts=6, hidden_size=48, moe_intermediate_size=40, mlp_hidden_act="relu2"
    )
    config._experts_implementation = PLAIN
    module = NemotronHExperts(config).requires_grad_(False)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    experts = next(experts_of(module))
    x = torch.randn(10, 48)
    chosen, weights = routed(6, 10, 2)
    right = experts.alone(x, chosen, weights)
    for made in (TorchExperts(experts), NativeExperts(library(isa), experts)):
        torch.testing.assert_close(made(x, chosen, weights), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [TorchExperts, lambda experts: NativeExperts(load_library(2), experts)])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Gemma4Text"])
def test_a_choice_of_no_expert_adds_nothing(family: str, kind: Any) -> None:
    experts = one(family, torch.float32)
    x = torch.randn(10, 48, generator=torch.Generator().manual_seed(1))
    chosen, weights = routed(experts.count, 10, 2, nowhere=True)
    made = kind(experts)
    right = experts.alone(x, chosen, weights)
    torch.testing.assert_close(made(x, chosen, weights), right, rtol=1e-4, atol=1e-5)
    assert made.load.sum() == (chosen < experts.count).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_LEVEL
def test_a_row_does_not_depend_on_the_others(isa: str, dtype: torch.dtype) -> None:
    """To the last bit: batch-invariant mode rests on it."""
    experts = one("GptOss", dtype)
    x = torch.randn(70, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    chosen, weights = routed(experts.count, 70, 2)
    native = NativeExperts(library(isa), experts)
    whole = native(x, chosen, weights)
    for rows in ([0], [69], [3, 50], list(range(69, 20, -1)), list(range(0, 70, 7))):
        assert torch.equal(native(x[rows], chosen[rows], weights[rows]), whole[rows])


def test_what_differs_from_the_models_own_loop_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets the bias of one expert; then torch computes, and the weights stay."""
    forgetful = ExpertsModule.up_bias.fget

    def forget(self: ExpertsModule) -> torch.Tensor:
        bias = forgetful(self).clone()  # type: ignore[misc]
        bias[2] = 0
        return bias

    model = model_of("GptOss")
    right = logits(model)
    monkeypatch.setattr(ExpertsModule, "up_bias", property(forget))
    group_experts(model, load_library(2))
    monkeypatch.undo()
    assert {e.module.diptych_experts.name for e in experts_of(model)} == {"transformers' loop"}
    torch.testing.assert_close(logits(model), right)


def test_a_model_without_experts_is_left_alone() -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**SIZE), experts_implementation=PLAIN
    )
    assert group_experts(model, None) is None
    assert model.config._experts_implementation != EXPERTS_NAME


def test_how_uneven_the_last_minutes_were() -> None:
    from engine.experts.load import ExpertLoad

    even, uneven = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    load = ExpertLoad([even, uneven])
    assert (load.routed(), load.imbalance(0.0)) == (0, 0.0)
    even += 10
    uneven += torch.tensor([30, 10, 0, 0])
    assert (load.routed(), load.imbalance(30.0)) == (80, 3.0)
    assert load.imbalance(61.0) == 3.0
    even += 5
    assert load.imbalance(122.0) == 1.0
