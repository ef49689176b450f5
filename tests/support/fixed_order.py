"""Arithmetic whose bits depend on no library: what tests of bits may rest on, on any processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def product(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    """start + a @ b. Each number is one sum over K in order, by multiplications and additions that IEEE 754 defines."""
    out = start.copy()
    for k in range(a.shape[-1]):
        out += a[..., :, k, None] * b[..., None, k, :]
    return out


def total(data: np.ndarray, axis: int | None, keepdims: bool) -> np.ndarray:
    """The sum along `axis` in order; numpy's own order depends on the layout."""
    if axis is None:
        return total(data.reshape(-1), 0, keepdims=False).reshape((1,) * data.ndim if keepdims else ())
    last = np.take(np.add.accumulate(data, axis=axis), [-1], axis=axis)
    return last if keepdims else last.squeeze(axis)


def rounded(function: Any) -> Any:
    """float32 from float64: implementations that differ in float64's last bits round to the same float32 but in about
    one of 2^28 cases, so it does not matter by which of them (vectors, a vector loop's remainder) a number comes.
    """

    def evaluate(data: np.ndarray) -> np.ndarray:
        return function(data.astype(np.float64)).astype(data.dtype) if data.dtype == np.float32 else function(data)

    return evaluate


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In torch's place: [rows, in], [out, in] -> [rows, out]."""
    start = torch.zeros(len(x), len(weight)) if bias is None else bias.float().expand(len(x), -1)
    found = product(x.float().numpy(), weight.float().numpy().T, start.numpy())
    return torch.from_numpy(found).to(x.dtype)
