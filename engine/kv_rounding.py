"""Keys and values in 8 bits: what is kept of them, whoever computes it.

1. Each token's key of each head, and each value, is rounded by itself: its scale is its largest magnitude / 127,
   rounded to bfloat16, and an element becomes the nearest whole number of scales. With fp8 it is / 448, and the nearest
   number that E4M3 has (float8_e4m3fn). There is no zero point. A scale that would be denormal is 1, and so the numbers
   are zero.
2. That happens once, when the token is written. Numbers and scale stand side by side in the token's row of its block
   (kv_transfer/layout.py) and are never changed: neither chunks nor the batch nor a handoff can make others of them.
3. Whoever attends reads the rows, also of the tokens that it has just written: a prompt's own tokens look at each other
   as later ones will.
4. With int8_values and fp8_values keys stay as they are.

engine/native/rounding.h writes the same, to the bit. Its attention multiplies scores and weights by the scales: what is
read there is not rounded to bfloat16 once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn.functional import pad

from engine.model_errors import ModelLoadError
from kv_transfer.layout import SCALE_BYTES, Group, Rounding

_MOST = {"int8": 127.0, "fp8": 448.0}
_KEPT = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LEAST = torch.finfo(torch.bfloat16).tiny
_VERSION = 1  # of the arithmetic


Numbers = Literal["int8", "fp8"]


@dataclass(frozen=True, slots=True)
class RoundedRows:
    """Rows of bytes of a rounded group, each with a token's key and value of one head."""

    group: Group

    @property
    def numbers(self) -> Numbers:
        return numbers_of(self.group.rounding)

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes in and comes out."""
        return getattr(torch, self.group.dtype)

    def of(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """key, value [..., width] -> [..., row_bytes]. A value that is narrower is followed by zeros."""
        width, (key_bytes, value_bytes, row_bytes) = self.group.width, self.group.row_parts
        value = pad(value, (0, width - value.shape[-1]))
        small = _small(value, self.numbers)
        if self.group.rounds_keys:
            keys = _small(key, self.numbers)
        else:
            keys = key.to(self.dtype).contiguous().view(torch.uint8)
        return pad(torch.cat((keys, small), -1), (0, row_bytes - key_bytes - value_bytes))

    def read(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., row_bytes] -> key and value, each [..., width]"""
        key_bytes, value_bytes, _ = self.group.row_parts
        keys, values = rows[..., :key_bytes], rows[..., key_bytes : key_bytes + value_bytes]
        value = _read(values, self.numbers, self.dtype)
        if self.group.rounds_keys:
            return _read(keys, self.numbers, self.dtype), value
        return keys.contiguous().view(self.dtype), value


def rounded(rounding: Rounding, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a reader finds of keys and values [..., width], in their own type."""
    if not rounding:
        return key, value
    numbers = numbers_of(rounding)
    kept = _read(_small(value, numbers), numbers, value.dtype)
    return (_read(_small(key, numbers), numbers, key.dtype) if rounding == numbers else key), kept


def numbers_of(rounding: Rounding) -> Numbers:
    return "fp8" if rounding.startswith("fp8") else "int8"


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


def _small(x: torch.Tensor, kind: Numbers) -> torch.Tensor:
    """[..., width] -> numbers and scale as bytes [..., width + 2]"""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    # By a tensor: CUDA multiplies by the inverse of a number, which is not the same.
    most = _MOST[kind]
    scale = (largest / torch.full_like(largest, most)).bfloat16()
    scale = torch.where(scale < _LEAST, 1.0, scale)  # what is no number stays none
    numbers = wide / scale.float()
    numbers = (numbers.round() if kind == "int8" else numbers).clamp(-most, most).nan_to_num(0.0).to(_KEPT[kind])
    return torch.cat((numbers.view(torch.uint8), scale.view(torch.uint8)), -1)


def _read(parts: torch.Tensor, kind: Numbers, dtype: torch.dtype) -> torch.Tensor:
    """In float16 the most scales, which were rounded up, may be more than there is."""
    wide = _wide(parts, kind)
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        wide = wide.clamp_(-most, most)
    return wide.to(dtype)


def _wide(parts: torch.Tensor, kind: Numbers) -> torch.Tensor:
    """And back, [..., width] float32: exact, 8 bits times 8 bits."""
    numbers = parts[..., :-SCALE_BYTES].contiguous().view(_KEPT[kind]).float()
    return numbers * parts[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16).float()
