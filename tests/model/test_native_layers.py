"""Linear layers and norms on the native kernels, in models that do not run as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engine.merged_linear import merge_projections
from engine.native.layers import NativeProduct, use_native_layers
from engine.native.mlp import NativeMlp
from tests.support.native_levels import EVERY_LEVEL, library

SIZE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 72, "intermediate_size": 102, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = torch.randint(3, 131, (1, 40), generator=torch.Generator().manual_seed(2))
FAMILIES = {  # norms: by the weight, by 1 + the weight; biases; other names
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Gemma2": {},
    "Gemma3Text": {},
    "Olmo2": {},
    "Phi3": {"pad_token_id": 0},
    "Granite": {},
    "FalconH1": {"mlp_multipliers": [0.7, 1.3], "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "Lfm2": {"layer_types": ["full_attention"] * 2, "block_auto_adjust_ff_dim": False},
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**(SIZE | FAMILIES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            weight.data += torch.randn(weight.shape) * 0.2
    return model.eval().requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS, use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@EVERY_LEVEL
def test_a_model_on_native_layers_is_itself(isa: str, family: str) -> None:
    model = model_of(family)
    right, embedding = logits(model), model.get_input_embeddings().weight.clone()
    merge_projections(model)
    norms = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    found = use_native_layers(model, library(isa))
    assert found[1] == norms
    blocks = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), NativeMlp)]
    assert len(blocks) == SIZE["num_hidden_layers"]
    torch.testing.assert_close(logits(model), right, rtol=1e-4, atol=1e-4)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert [p.shape for p in matrices] == [embedding.shape], "weights are held twice"


def test_a_part_of_a_merged_projection_on_its_own() -> None:
    model = model_of("Llama")
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 5, 72, generator=torch.Generator().manual_seed(1))
    right = [p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    merge_projections(model)
    use_native_layers(model, library("vectors"))
    for projection, expected in zip((attention.q_proj, attention.k_proj, attention.v_proj), right, strict=True):
        torch.testing.assert_close(projection(x.clone()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 3, 33, 600])
@EVERY_LEVEL
def test_any_number_of_rows(isa: str, rows: int) -> None:
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        layer = nn.Linear(70, 50).to(dtype).requires_grad_(False)
        x = torch.randn(2, rows, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
        made = NativeProduct(library(isa), layer.weight, layer.bias)(x).float()
        right = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
        torch.testing.assert_close(made, right, rtol=limit, atol=limit)


def test_what_computes_something_else_stays_with_torch() -> None:
    class HalfRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.full((24,), 0.5)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight + 0.01

    class GatedRMSNorm(HalfRMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * gate

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kv_b_proj = nn.Linear(24, 24)  # other code reads its weight

    model = nn.ModuleList([HalfRMSNorm(), GatedRMSNorm(), Own()])
    assert use_native_layers(model, library("vectors")) == (0, 0)
