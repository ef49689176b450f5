"""Experts on the native kernels (experts.h): packed copies of their weights, one call a layer.

The gate is tried with numbers: those that the kernel computes run within one call; with any other, torch computes it
between two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import pad, silu

from engine.experts.parts import ExpertsModule
from engine.native.library import DOWN, DTYPES, UP, WHOLE, CExperts, Library
from engine.native.quantized import Scaled, pack_in_turn, room_of
from engine.quantization import Alike

_PANEL = 32


def obstacle_to_native_experts(experts: ExpertsModule) -> str | None:
    if experts.up.dtype not in DTYPES:
        return f"the kernels compute in float32 and bfloat16, and it is {str(experts.up.dtype).removeprefix('torch.')}"
    if experts.has_norm:
        return "it has a norm behind each expert"
    return None


class NativeExperts:
    """Holds copies of all weights: the module may lose its own."""

    def __init__(self, library: Library, experts: ExpertsModule, small: Alike | None = None) -> None:
        """`small`: of both products, where they are quantized."""
        self.name = f"native ({library.isa})"
        # [count, out, groups] of each product
        self._scales: Sequence[torch.Tensor | None] = [None, None] if small is None else small.scales
        self._library, self._experts = library, experts
        self._dtype = experts.up.dtype
        up, down = (experts.rows(w, 0).shape for w in (experts.up, experts.down))
        gate = _known_gate(experts)
        self.load = torch.zeros(experts.count, dtype=torch.int64)
        c = self._c = CExperts()
        c.is_bf16, c.count = self._dtype == torch.bfloat16, experts.count
        c.bits = 0 if small is None else small.bits
        self.hidden, self._columns, self._inner = up[1], up[0], down[1]
        c.hidden, c.columns, c.inner = self.hidden, self._columns, self._inner
        c.alpha, c.limit, c.plus = gate or (1.0, math.inf, 0.0)
        self._whole = gate is not None
        self._held = [self._packed(self._first), self._packed(self._second)]
        self._scales = [None, None]  # the packed copies have them
        c.up, c.down = (packed.data_ptr() for packed in self._held)
        c.up_bias, c.down_bias = self._first_bias(experts.up_bias), self._hold(_whole_panels(experts.down_bias))
        c.load = self.load.data_ptr()

    @property
    def held_bytes(self) -> int:
        """Of weights, packed, and biases."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._held)

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        x, chosen = x.contiguous(), chosen.to(torch.int64).contiguous()
        scale = weights.to(torch.float32).contiguous()
        out = torch.empty_like(x)
        if self._whole:
            self._library.experts(self._c, WHOLE, chosen, scale, x, None, out)
            return out
        first = x.new_empty(chosen.numel(), self._columns)
        self._library.experts(self._c, UP, chosen, scale, x, first, None)
        inner = self._experts.gate(first).to(self._dtype).contiguous()
        self._library.experts(self._c, DOWN, chosen, scale, None, inner, out)
        return out

    def _halves(self, of: torch.Tensor, dim: int) -> list[torch.Tensor]:
        if not self._whole:
            return [of]
        if self._experts.interleaved:
            return [of.unflatten(dim, (-1, 2)).select(dim + 1, i) for i in (0, 1)]
        return list(of.chunk(2, dim))

    def _first(self, expert: int) -> list[Scaled]:
        weights = self._halves(self._experts.rows(self._experts.up, expert).contiguous(), 0)
        scales = self._scales[0]
        own = [None] * len(weights) if scales is None else self._halves(scales[expert], 0)
        return list(zip(weights, own, strict=True))

    def _second(self, expert: int) -> list[Scaled]:
        scales = self._scales[1]
        weight = self._experts.rows(self._experts.down, expert).contiguous()
        return [(weight, None if scales is None else scales[expert])]

    def _packed(self, parts: Callable[[int], list[Scaled]]) -> torch.Tensor:
        """`parts`: of an expert, those whose panels lie in turn."""
        experts = range(self._experts.count)
        bits = self._c.bits
        if not bits:
            return self._library.pack_experts([[weight for weight, _ in parts(e)] for e in experts])
        out = torch.empty((len(experts), *room_of(bits, *parts(0))), dtype=torch.uint8)
        self._library.large_pages(out)
        for expert, place in zip(experts, out, strict=True):
            pack_in_turn(bits, place, *parts(expert))
        return out

    def _first_bias(self, bias: torch.Tensor | None) -> int | None:
        """As its panels: gate and up in turn."""
        if bias is None:
            return None
        parts = [_whole_panels(part) for part in self._halves(bias, 1)]
        return self._hold(torch.stack([p.view(len(p), -1, _PANEL) for p in parts if p is not None], 2))

    def _hold(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._held.append(tensor.contiguous())
        return self._held[-1].data_ptr()


def _whole_panels(bias: torch.Tensor | None) -> torch.Tensor | None:
    """[experts, columns] -> float32, columns padded to whole panels."""
    return None if bias is None else pad(bias.float(), (0, -bias.shape[1] % _PANEL))


def _known_gate(experts: ExpertsModule) -> tuple[float, float, float] | None:
    """alpha, limit and plus of the kernel's formula, if it is the module's gate."""
    if not experts.gated:
        return None
    limit = _number(experts.module, "limit", "swiglu_limit")
    alpha = _number(experts.module, "alpha", "swiglu_alpha")
    given = torch.linspace(-30, 30, 64)[torch.randperm(64 * 64, generator=torch.Generator().manual_seed(0)) % 64]
    given = given.view(64, 64)
    gate, up = (given[:, ::2], given[:, 1::2]) if experts.interleaved else given.chunk(2, dim=-1)
    theirs = experts.gate(given)
    for known in ((1.0, math.inf, 0.0), (1.0, limit, 0.0), (alpha, limit, 1.0)):
        a, most, plus = known
        g = gate.clamp(max=most)
        if torch.allclose(theirs, (up.clamp(-most, most) + plus) * silu(g * a) / a, rtol=1e-4, atol=1e-5):
            return known
    return None


def _number(module: Any, *names: str) -> float:
    found = next((value for name in names if (value := getattr(module, name, None)) is not None), None)
    return float(found) if isinstance(found, int | float) and found > 0 else math.nan
