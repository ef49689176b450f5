"""Tiny random-weight models of every family of causal language models that transformers has.

`tiny_config` shrinks a family's default configuration by the names of its fields: what is a width, a count of layers,
heads or experts, a window, is small whatever its family calls it. BUILT has what a family needs besides: to be built at
all, or to have the features of what is published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WINDOW = 16
CONTEXT = 256
VOCABULARY = 128
SMALL_LATENT: dict[str, Any] = {  # of a DeepSeek-V3: a dense layer, then experts in groups
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
    "head_dim": None,
}
# The first pattern that matches the whole name decides. Only numbers are replaced, and never 0 or 1 by more.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|text_vocab_size|vocab_size_per_layer_input|n_vocab", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len(gth)?|max_sequence_length|max_target_positions", CONTEXT),
    (r"original_max_position_embeddings", CONTEXT // 2),
    (r"sliding_window(_size)?|attention_window_size|local_attention|window_size|attention_chunk_size", WINDOW),
    (r"index_topk", WINDOW),
    (r"(decoder_|encoder_)?layers|num_hidden_layers|n_layers?|num_layers|num_(decoder|encoder)_layers", 2),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|word_embed_proj_dim|model_dim|lru_width|emb_dim", 64),
    (r"(moe|shared_expert|expert|shared)_?(intermediate|ffn_hidden)_size|ffn_hidden_size|.*expert.*_size", 32),
    (r".*intermediate_size.*|.*ffn_dim|n_inner|d_ff|d_inner|ffn_size", 96),
    (r"num_key_value_heads|n_kv_heads|num_kv_heads|num_global_key_value_heads", 2),
    (r"((decoder|encoder)_)?(num_)?attention_heads|n_heads?|num_heads", 4),
    (r"(global_)?head_dim|head_size|attention_head_dim|kv_channels|v_head_dim|swa_head_dim|swa_v_head_dim", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 8),
    (r"q_lora_rank|hidden_size_per_layer_input", 24),
    (r"kv_lora_rank", 16),
    (r"num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k", 2),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_moe_experts|expert_num", 4),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|mamba_ngroups|first_k_dense_replace", 1),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"mamba_d_ssm", 128),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_state_dim", 16),
    (r"chunk_size|mamba_chunk_size", 16),
    (r"linear_num_key_heads|index_n_heads", 2),
    (r"linear_num_(value_)?heads", 4),
    (r"linear_((key|value)_)?head_dim|index_head_dim", 16),
    (r"time_step_rank|mamba_dt_rank|altup_num_inputs|laurel_rank", 4),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
)  # fmt: skip


_KINDS = ("sliding_attention", "full_attention")
_TEXT_OF = {
    "cohere_compass": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in _KINDS},
    },
    "gemma3n": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": None,
    },
}
# Positions in three dimensions, which are one in text.
_MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}}
_HALF_MROPE = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
}
_XDROPE = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [2, 2, 2, 2]}}
}
_WITH_MROPE = (*("glm46v", "glm4v", "glm_ocr", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"),)
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}


def longrope(original: int, **more: float) -> dict[str, Any]:
    """Two rotary tables, as in Phi-3.5 and Phi-4-mini, for heads of 16 elements."""
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [1.5 + i / 4 for i in range(8)],
            "original_max_position_embeddings": original,
            **more,
        },
    }


_ORIGINAL = 2 * WINDOW + 3  # one prompt of a course grows beyond it, one begins there
# What a family needs to be built tiny, beside small numbers.
BUILT: Mapping[str, Mapping[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    **{name: {"text_config": text} for name, text in _TEXT_OF.items()},
    **dict.fromkeys(_WITH_MROPE, _MROPE),
    "cohere_compass_text": _TEXT_OF["cohere_compass"],
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": _MAMBA,
    "exaone4_5": {"text_config": {"model_type": "exaone4"}, "vision_config": {"model_type": "exaone4_5_vision"}},
    "gemma3n_text": _TEXT_OF["gemma3n"],
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_hidden_layers": 3,
        "num_local_experts": 0,
        "mamba_n_heads": 8,
        "shared_intermediate_size": 64,
    },
    "glm4v_moe": _HALF_MROPE,
    "hunyuan_vl": _XDROPE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {
        "layer_types": None,
        "layers_block_type": ["mamba", "attention", "mlp", "moe", "mamba"],
        "num_hidden_layers": 5,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 32,
    },
    "phi3": longrope(_ORIGINAL),
    "phimoe": longrope(_ORIGINAL, short_mscale=1.1, long_mscale=1.3),
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 48]},
    "zamba2": {
        "layer_types": None,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
    },
    "zamba": {
        "num_hidden_layers": 3,
        "layer_types": None,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
    },
}


SEEDS = {"olmo2": 5}  # whose answers have no near-ties
# By model_type, as people name them: Llama 3 and 4, Qwen 2.5 to 3.5, Gemma 2 to 4, gpt-oss, DeepSeek V2 to V3.2, Kimi,
# GLM-4 to 4.7, Mistral, Ministral 3, Mixtral, Phi-3.5 and Phi-4-mini, Granite 3 and 4, OLMo 2 and 3, Command R and A,
# SmolLM3, EXAONE 4, MiniMax M2, Falcon-H1, Nemotron-H, LFM2.
PEOPLE_SERVE = (
    *("llama", "llama4_text", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
    *("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
    *("kimi_linear", "glm4", "glm4_moe", "glm4_moe_lite", "mistral", "ministral3", "mixtral", "phi3", "phimoe"),
    *("granite", "granitemoehybrid", "olmo2", "olmo3", "cohere", "cohere2", "smollm3", "exaone4", "minimax_m2"),
    *("falcon_h1", "nemotron_h", "lfm2"),
)


class NotBuilt(Exception):
    """No tiny model of this family can be made here; the message says why."""


def size_of(name: str) -> int | None:
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)


def tiny_fields(config: Any) -> dict[str, Any]:
    """Of a default configuration: the fields to make a tiny one with; nested configurations likewise."""
    fields: dict[str, Any] = {}
    parts = getattr(config, "sub_configs", None) or {}
    for name, value in config.to_dict().items():
        if name in parts:
            own = getattr(config, name, None)
            if hasattr(own, "to_dict"):
                fields[name] = tiny_fields(own)
            continue
        if name == "initializer_range":
            fields[name] = 0.1  # so that attention decides tokens
        size = size_of(name)
        if size is None:
            continue
        if name.endswith("_token_id") or (name == "head_dim" and value is None):
            fields[name] = size
        elif isinstance(value, int) and not isinstance(value, bool):
            fields[name] = min(size, value) if value in (0, 1) else size
    if fields.get("kv_lora_rank") and "num_key_value_heads" in fields:  # latent: each head has keys of its own
        fields["num_key_value_heads"] = fields["num_attention_heads"]
        if getattr(config, "head_dim", None) == config.qk_rope_head_dim:
            fields["head_dim"] = fields["qk_rope_head_dim"]
    stated = getattr(config, "layer_types", None)
    kept_as = (getattr(config, "attribute_map", None) or {}).get("layer_types", "layer_types")
    if stated and not isinstance(getattr(type(config), kept_as, None), property):
        kinds = sorted(set(stated), key=list(stated).index)
        fields["layer_types"] = [*kinds, *kinds][: max(2, len(kinds))]
        fields["num_hidden_layers"] = len(fields["layer_types"])
    return fields


def tiny_config(model_type: str, changes: Mapping[str, Any] | None = None) -> Any:
    """`changes` come last; None leaves a field out, so that the family's own default stands."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[model_type]
    return made(**_merged(tiny_fields(made()), BUILT.get(model_type, {}) if changes is None else changes))


def _merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested configurations are changed, not replaced."""
    nested = {
        name: _merged(fields[name], value)
        for name, value in changes.items()
        if name.endswith("_config") and isinstance(fields.get(name), Mapping)
    }
    return {name: value for name, value in (dict(fields) | dict(changes) | nested).items() if value is not None}


def auto_class(model_type: str) -> Any:
    """What transformers makes a model of this family with: some that see are no causal language models to it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText


def saved_family(directory: Path, model_type: str, changes: Mapping[str, Any] | None = None) -> Path:
    """Raises NotBuilt."""
    import torch

    torch.manual_seed(SEEDS.get(model_type, 3))
    try:
        config = tiny_config(model_type, changes)
        try:
            model = auto_class(model_type).from_config(config, dtype=torch.float32)
        except ImportError:  # a tower of another library
            return _saved_text(directory, config)
    except Exception as error:  # of transformers' own code, on a configuration that it may not have met
        raise NotBuilt(f"{type(error).__name__}: {str(error).strip()[:200]}") from error
    model.save_pretrained(directory)
    return directory


TEXT_ALONE = "text"  # beside a checkpoint: its text model, where the whole one cannot be made


def _saved_text(directory: Path, config: Any) -> Path:
    """The text of what sees, under the names of the whole model, and once more by itself."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config.get_text_config(), dtype=torch.float32)
    model.save_pretrained(directory / TEXT_ALONE)
    tied = {"lm_head.weight"} if config.get_text_config().tie_word_embeddings else set[str]()
    tensors = {
        re.sub(r"^model\.", "model.language_model.", name): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    return directory


def reference_of(directory: Path, model_type: str) -> Any:
    """As transformers loads it. Raises NotBuilt."""
    import torch
    from transformers import AutoModelForCausalLM

    alone = directory / TEXT_ALONE
    kind, path = (AutoModelForCausalLM, alone) if alone.exists() else (auto_class(model_type), directory)
    model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise NotBuilt(f"transformers does not find all weights in what it saved: {sorted(info['missing_keys'])[:3]}")
    return model.eval()
