"""Random LoRA adapters as PEFT saves them, and transformers' own model with one merged into its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plain_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)


def saved_adapter(
    model: Path,
    to: Path,
    seed: int,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = EVERYTHING,
    size: float = 0.2,
    **settings: Any,
) -> Path:
    """Of a model's layers; `size`: of its random weights, large enough that answers differ."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in plain_model(model).named_modules():
        if isinstance(layer, nn.Linear) and path.rpartition(".")[2] in targets:
            begins = f"base_model.model.{path}.lora_"
            tensors[f"{begins}A.weight"] = torch.randn(rank, layer.in_features, generator=generator) * size
            tensors[f"{begins}B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * size
    to.mkdir(parents=True, exist_ok=True)
    save_file(tensors, to / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "target_modules": list(targets),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }
    (to / "adapter_config.json").write_text(json.dumps(config | settings))
    return to


def merged_model(model: Path, adapter: Path) -> Any:
    """Written down here once more, without the engine's code: W + B A alpha / r, or / sqrt(r) for rsLoRA."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
    tensors = load_file(adapter / "adapter_model.safetensors")
    merged = plain_model(model)
    for path, layer in merged.named_modules():
        begins = f"base_model.model.{path}.lora_"
        if f"{begins}A.weight" in tensors:
            layer.weight += (tensors[f"{begins}B.weight"] @ tensors[f"{begins}A.weight"]) * scaling
    return merged
