"""One small configuration for each family that benchmarks/families.py measures: random weights, made on the spot.

Four layers of 512, so that products count and a run takes minutes; what makes the family is as in its published models
(experts, windows, soft caps, latent attention, state), with sizes to match.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WINDOW = 128
LAYERS = 4
_SIZE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
_GROUPED: dict[str, Any] = {
    "n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 256, "first_k_dense_replace": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    config: str  # of transformers
    changes: dict[str, Any]
    experts: bool = False
    windowed: bool = False  # the KV of its windows is compared with that of full attention


FAMILIES = (
    Family("Llama 3", "LlamaConfig", {}),
    Family("Qwen3", "Qwen3Config", {}),
    Family("Mistral with a window", "MistralConfig", {"sliding_window": WINDOW}, windowed=True),
    Family("Gemma 2", "Gemma2Config", {"sliding_window": WINDOW, "query_pre_attn_scalar": 64}, windowed=True),
    Family(
        "Gemma 3",
        "Gemma3TextConfig",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        windowed=True,
    ),
    Family(
        "gpt-oss",
        "GptOssConfig",
        {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 512, "sliding_window": WINDOW},
        experts=True,
        windowed=True,
    ),
    Family("Qwen3-MoE", "Qwen3MoeConfig", _EXPERTS | {"norm_topk_prob": True}, experts=True),
    Family(
        "Mixtral",
        "MixtralConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024, "sliding_window": None},
        experts=True,
    ),
    Family("GLM-4.5", "Glm4MoeConfig", _GROUPED, experts=True),
    Family(
        "DeepSeek V3",
        "DeepseekV3Config",
        _GROUPED
        | {
            "kv_lora_rank": 128, "q_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
            "num_key_value_heads": 8, "head_dim": 32,
        },
        experts=True,
    ),
    Family(
        "Qwen3-Next",
        "Qwen3NextConfig",
        _EXPERTS
        | {
            "shared_expert_intermediate_size": 256, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
            "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        },
        experts=True,
    ),
    Family(
        "Kimi Linear",
        "KimiLinearConfig",
        {
            "num_local_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "n_shared_experts": 1,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_head_dim": 64,
            "linear_num_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 128, "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64, "v_head_dim": 64,
        },
        experts=True,
    ),
    Family(
        "Granite 4",
        "GraniteMoeHybridConfig",
        {
            "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 256,
            "shared_intermediate_size": 512, "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_expand": 2,
        },
        experts=True,
    ),
    Family(
        "Falcon-H1",
        "FalconH1Config",
        {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_chunk_size": 64},
    ),
    Family(
        "LFM2",
        "Lfm2Config",
        {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
)  # fmt: skip


def save_model(family: Family, directory: Path, dtype: str) -> Path:
    """A checkpoint of random weights."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**(_SIZE | family.changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for name, weight in model.named_parameters():
        if "bias" in name or "sink" in name:
            torch.nn.init.normal_(weight.data, std=0.02)
    model.save_pretrained(directory)
    return directory
