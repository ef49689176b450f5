"""transformers' own models with rounded weights: what quantized engines are held against, made without their code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

_COLUMNS_FIRST = ("GptOss", "Llama4")  # whose experts are [in, out]


def rounded(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """By hand: groups of 128 columns, nearest of the multiples of a bfloat16 scale, whole ones or of E4M3."""
    most = {"int8": 127, "int4": 7, "fp8": 448}[quantization]
    pieces = []
    for piece in weight.split(128, dim=-1):
        scale = (piece.abs().amax(-1, keepdim=True).clamp(min=1e-20) / most).bfloat16().float()
        number = (piece / scale).clamp(-most, most)
        pieces.append((_e4m3(number) if quantization == "fp8" else number.round()) * scale)
    return torch.cat(pieces, -1)


def _e4m3(number: torch.Tensor) -> torch.Tensor:
    """The nearest with three binary places behind the first one, which is worth at least 1/64; ties to even."""
    step = 2.0 ** (number.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return (number / step).round() * step


def model_with_rounded_weights(path: Path, quantization: str, groups: tuple[str, ...]) -> Any:
    """In float32. `groups`: of engine.quantized_groups."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    return round_weights(model, quantization, groups)


def round_weights(model: Any, quantization: str, groups: tuple[str, ...]) -> Any:
    for name, layer in model.named_modules():
        kind = "mlp" if ".mlp." in name else "attention" if ".self_attn." in name else "head"
        if isinstance(layer, nn.Linear) and kind in groups:
            layer.weight = nn.Parameter(rounded(layer.weight, quantization), requires_grad=False)
    if {"mlp", "experts"} & set(groups):
        for name, weight in model.named_parameters():
            if ".experts." in name and weight.dim() == 3:
                turned = type(model).__name__.startswith(_COLUMNS_FIRST)
                weight.data = (
                    rounded(weight.mT, quantization).mT.contiguous() if turned else rounded(weight, quantization)
                )
    return model
