"""Keys and values in 8 bits: what is kept of them, whoever computes it.

1. Each token's key of each head, and each value, is rounded by itself: its scale is its largest magnitude / 127,
   rounded to bfloat16, and an element becomes the nearest whole number of scales. There is no zero point. A scale that
   would be denormal is 1, and so the numbers are zero.
2. That happens once, when the token is written. Numbers and scale stand side by side in the token's row of its block
   (kv_transfer/layout.py) and are never changed: neither chunks nor the batch nor a handoff can make others of them.
3. Whoever attends reads the rows, also of the tokens that it has just written: a prompt's own tokens look at each other
   as later ones will.
4. With int8_values keys stay as they are.

engine/native/rounding.h writes the same, to the bit. Its attention multiplies scores and weights by the scales: what is
read there is not rounded to bfloat16 once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from engine.model_errors import ModelLoadError
from kv_transfer.layout import SCALE_BYTES, Group, Rounding

_MOST = 127
_LEAST = torch.finfo(torch.bfloat16).tiny
_VERSION = 1  # of the arithmetic


@dataclass(frozen=True, slots=True)
class RoundedRows:
    """Rows of bytes of a rounded group, each with a token's key and value of one head."""

    group: Group

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes in and comes out."""
        return getattr(torch, self.group.dtype)

    def of(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """key, value [..., width] -> [..., row_bytes]. A value that is narrower is followed by zeros."""
        width, (key_bytes, value_bytes, row_bytes) = self.group.width, self.group.row_parts
        value = pad(value, (0, width - value.shape[-1]))
        keys = (
            key.to(self.dtype).contiguous().view(torch.uint8) if self.group.rounding == "int8_values" else _small(key)
        )
        return pad(torch.cat((keys, _small(value)), -1), (0, row_bytes - key_bytes - value_bytes))

    def read(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., row_bytes] -> key and value, each [..., width]"""
        key_bytes, value_bytes, _ = self.group.row_parts
        keys, values = rows[..., :key_bytes], rows[..., key_bytes : key_bytes + value_bytes]
        if self.group.rounding == "int8_values":
            return keys.contiguous().view(self.dtype), _read(values, self.dtype)
        return _read(keys, self.dtype), _read(values, self.dtype)


def rounded(rounding: Rounding, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a reader finds of keys and values [..., width], in their own type."""
    if not rounding:
        return key, value
    kept = _read(_small(value), value.dtype)
    return key if rounding == "int8_values" else _read(_small(key), key.dtype), kept


def rounding_of(kv_dtype: str) -> Rounding:
    """Of engine.kv_dtype."""
    return "" if kv_dtype == "model" else kv_dtype  # type: ignore[return-value]


def rounded_groups(model: Any, groups: Sequence[Group], rounding: Rounding) -> tuple[Group, ...]:
    """Raises ModelLoadError where that is not offered. States stay as they are."""
    if not rounding:
        return tuple(groups)
    why = ""
    if any(group.rule.values for group in groups):
        why = "its layers keep one latent vector a token for all heads, which is not rounded"
    elif not any(group.kind == "heads" and group.width > 1 for group in groups):
        why = "none of its layers keeps keys and values"
    if why:
        raise ModelLoadError(
            f"{type(model).__name__} cannot be served with engine.kv_dtype {rounding}: {why}; set it to model"
        )
    return tuple(group if group.rule.state else replace(group, rounding=rounding) for group in groups)


def rounded_identity(model: str, rounding: Rounding) -> str:
    """Of a model whose KV is kept so: what later layers make of a token differs, and so do answers."""
    return hashlib.sha256(f"{model}|kv-{_VERSION}|{rounding}".encode()).hexdigest()[:32] if rounding else model


def _small(x: torch.Tensor) -> torch.Tensor:
    """[..., width] -> numbers and scale as bytes [..., width + 2]"""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    # By a tensor: CUDA multiplies by the inverse of a number, which is not the same.
    scale = (largest / torch.full_like(largest, _MOST)).bfloat16()
    scale = torch.where(scale < _LEAST, 1.0, scale)  # what is no number stays none
    numbers = (wide / scale.float()).round().clamp(-_MOST, _MOST).nan_to_num(0.0).to(torch.int8)
    return torch.cat((numbers.view(torch.uint8), scale.view(torch.uint8)), -1)


def _read(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In float16 127 scales, which were rounded up, may be more than there is."""
    wide = _wide(parts)
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        wide = wide.clamp_(-most, most)
    return wide.to(dtype)


def _wide(parts: torch.Tensor) -> torch.Tensor:
    """And back, [..., width] float32: exact, 8 bits times 8 bits."""
    numbers = parts[..., :-SCALE_BYTES].contiguous().view(torch.int8).float()
    return numbers * parts[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16).float()
