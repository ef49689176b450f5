"""transformers' own models with rounded weights: what quantized engines are held against, made without their code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """By hand: groups of 128 columns, nearest of the multiples of a bfloat16 scale."""
    most = 2 ** (bits - 1) - 1
    pieces = []
    for piece in weight.split(128, dim=1):
        scale = (piece.abs().max(1, keepdim=True).values.clamp(min=1e-20) / most).bfloat16().float()
        pieces.append((piece / scale).round().clamp(-most, most) * scale)
    return torch.cat(pieces, 1)


def model_with_rounded_weights(path: Path, bits: int, groups: tuple[str, ...]) -> Any:
    """In float32. `groups`: of engine.quantized_groups."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    for name, layer in model.named_modules():
        kind = "mlp" if ".mlp." in name else "attention" if ".self_attn." in name else "head"
        if isinstance(layer, nn.Linear) and kind in groups:
            layer.weight = nn.Parameter(rounded(layer.weight, bits), requires_grad=False)
    return model
