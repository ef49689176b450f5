"""What published models keep of a sequence: by their own sizes, seen in a model without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kv_transfer.layout import Group

# Of their config.json, what the sizes of the KV cache follow from, and what building them takes.
PUBLISHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama 3.1 8B": (
        "llama",
        {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "vocab_size": 128256,
        },
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "num_hidden_layers": 24, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "num_local_experts": 32,
            "num_experts_per_tok": 4, "max_position_embeddings": 131072, "vocab_size": 201088,
        },
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
            "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
            "max_position_embeddings": 163840, "vocab_size": 129280,
        },
    ),
}  # fmt: skip


def groups_of_published(name: str) -> tuple[Group, ...]:
    """In bfloat16, as a worker would find them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from engine.attention.interface import ATTENTION_NAME, register
    from engine.latent import serve_latent
    from engine.model_check import quietly
    from engine.model_probe import groups_of, probe_layers

    register()
    model_type, fields = PUBLISHED[name]
    config: Any = CONFIG_MAPPING[model_type](**fields)
    limit = config.max_position_embeddings
    with quietly(), FakeTensorMode(), torch.inference_mode():
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=torch.bfloat16)
        serve_latent(model, limit)
        return groups_of(probe_layers(model, torch.device("cpu"), limit), "bfloat16")


def row_of_published(name: str) -> str:
    groups = groups_of_published(name)
    shapes = ", ".join(f"{g.rule}: {len(g.layers)} layers, {g.kv_heads} x {g.width}" for g in groups)
    a_token, a_sequence = sum(g.growing_bytes for g in groups), sum(g.sequence_bytes for g in groups)
    return f"| {name} | {shapes} | {a_token:,} | {a_sequence:,} |"
