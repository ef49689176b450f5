"""Gated feed-forward blocks on the native kernels: one call in place of three products and what lies between them.

A block is a mixture with one expert that every row chooses. Whether its gate is one that the kernel knows is found with
numbers: the activation by itself, where the module has one, then the whole block.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from engine.merged_linear import MERGED
from engine.native.library import DTYPES, CExperts, Library
from engine.native.quantized import packed
from engine.quantization import Alike, quantized

_APART = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_TOGETHER = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))  # all gates first
_ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")
_SILU = (1.0, 0.0)
_GELU_TANH = (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715)
_PANEL = 32
_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

Weighted = tuple[torch.Tensor, torch.Tensor | None]  # a weight and its bias
Scales = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
NO_SCALES: Scales = (None, None, None)


class Constant:
    """A tensor of one number, as long as it was ever needed. The engine's thread alone computes."""

    def __init__(self, value: float, dtype: torch.dtype) -> None:
        self._value, self._dtype = value, dtype
        self._there, self._at = torch.zeros(0, dtype=dtype), (0, 0)

    def at(self, rows: int) -> int:
        have, place = self._at
        if rows > have:
            self._there = torch.full((2 * rows,), self._value, dtype=self._dtype)
            self._at = have, place = 2 * rows, self._there.data_ptr()
        return place


ZEROS = Constant(0, torch.int64)  # the choices of rows that have no choice


def use_native_mlps(model: Any, library: Library) -> int:
    """How many blocks run so from now on. Their own weights are given up."""
    count = 0
    small = quantized(model)
    for path, module in model.named_modules():
        names = next((n for n in _APART + _TOGETHER if all(_is_linear(getattr(module, x, None)) for x in n)), None)
        if names is None or len(inspect.signature(module.forward).parameters) != 1:
            continue
        paths = [f"{path}.{name}" for name in names]
        kept = None if small is None else small.alike(paths)
        if small is not None and kept is None and any(p in small.scales for p in paths):
            continue  # of several kinds: each by itself
        made = _block(module, names, library, kept)
        if made is None:
            continue
        module.forward = made
        if small is not None and kept is not None:
            small.kept.update(paths)
        for name in names:
            layer = getattr(module, name)
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        count += 1
    return count


class NativeMlp:
    """x [..., hidden] -> [..., hidden]. Holds packed copies of the weights."""

    def __init__(
        self, library: Library, gate: Weighted, up: Weighted, down: Weighted, scales: Scales = NO_SCALES, bits: int = 0
    ) -> None:
        """`scales`: of gate, up and down, where they are quantized."""
        self._library = library
        self._inner, self._hidden = gate[0].shape
        self._held = [
            packed(library, bits, (gate[0], scales[0]), (up[0], scales[1])),
            packed(library, bits, (down[0], scales[2])),
        ]
        c = self._c = CExperts()
        c.is_bf16, c.count, c.hidden, c.inner = gate[0].dtype == torch.bfloat16, 1, self._hidden, self._inner
        c.columns = 2 * self._inner
        c.bits = 0 if scales[0] is None else bits
        c.limit = math.inf
        c.up, c.down = (packed.data_ptr() for packed in self._held)
        if gate[1] is not None and up[1] is not None:
            c.up_bias = self._hold(torch.stack([_panels(gate[1]), _panels(up[1])], dim=1))
        if down[1] is not None:
            c.down_bias = self._hold(_panels(down[1]))
        self.gated_by(_SILU, 1.0)

    def gated_by(self, gate: tuple[float, float], scale: float) -> None:
        self._c.alpha, self._c.cube = gate
        self._scale = Constant(scale, torch.float32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // self._hidden
        self._library.block(self._c, rows, ZEROS.at(rows), self._scale.at(rows), x, out)
        return out

    def _hold(self, tensor: torch.Tensor) -> int:
        self._held.append(tensor.contiguous())
        return self._held[-1].data_ptr()


@torch.no_grad()
def _block(
    module: Any,
    names: tuple[str, ...],
    library: Library,
    kept: Alike | None,
) -> NativeMlp | None:
    """`kept`: of the layers that `names` names."""
    layers = [_weighted(getattr(module, name)) for name in names]
    if len(layers) == 2:
        (weight, bias), down = layers
        if len(weight) % 2:
            return None
        biases = (None, None) if bias is None else bias.chunk(2)
        gate, up = ((w, b) for w, b in zip(weight.chunk(2), biases, strict=True))
    else:
        gate, up, down = layers
    dtypes = {weight.dtype for weight, _ in (gate, up, down)}
    one_type = len(dtypes) == 1 and dtypes <= set(DTYPES) and down[0].device.type == "cpu"
    if not one_type or gate[0].shape != up[0].shape or down[0].shape != gate[0].shape[::-1]:
        return None
    if (gate[1] is None) != (up[1] is None):
        return None
    known = list(_gates(module))
    if not known:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(18, gate[0].shape[1], generator=generator) * torch.tensor([0.1, 1.0, 8.0]).repeat(6)[:, None]
    x = x.to(down[0].dtype)
    try:
        theirs = module(x)
    except Exception:  # it wants more than rows
        return None
    made = NativeMlp(library, gate, up, down, *((NO_SCALES, 0) if kept is None else (_scales(kept), kept.bits)))
    for shape, scale in known:
        made.gated_by(shape, scale)
        if theirs.shape == x.shape and theirs.dtype == x.dtype and _off(made(x), theirs) <= _ALLOWED[x.dtype]:
            return made
    return None


def _scales(kept: Alike) -> Scales:
    """Of gate, up and down."""
    there = kept.scales
    gate, up, down = there if len(there) == 3 else (*there[0].chunk(2), there[1])
    return gate, up, down


def _gates(module: Any) -> Iterator[tuple[tuple[float, float], float]]:
    """Those that the module may have, and what its answer is multiplied by."""
    own: Any = next((a for name in _ACTIVATIONS if callable(a := getattr(module, name, None))), None)
    for shape in (_SILU, _GELU_TANH):
        if own is not None and not _is(own, shape):
            continue
        yield shape, 1.0
        factor, last = getattr(module, "gate_multiplier", None), getattr(module, "down_multiplier", None)
        if shape is _SILU and isinstance(factor, float) and isinstance(last, float):  # silu(f g) = f (g sigmoid(f g))
            yield (factor, 0.0), factor * last


def _is(activation: Callable[[torch.Tensor], torch.Tensor], shape: tuple[float, float]) -> bool:
    x = torch.linspace(-8, 8, 257)
    return torch.allclose(activation(x), x * torch.sigmoid(shape[0] * x + shape[1] * x**3), rtol=1e-5, atol=1e-5)


def _off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of the row that is furthest off, of its root mean square. A NaN is no agreement."""
    a, b = ours.float(), theirs.float()
    return ((a - b).square().mean(-1).sqrt() / b.square().mean(-1).sqrt().clamp(min=1e-20)).max().item()


def _is_linear(layer: Any) -> bool:
    return type(layer) is nn.Linear or isinstance(layer, MERGED)


def _weighted(layer: Any) -> Weighted:
    """Its own rows, also where it is the first of a merged group and its weight is all of theirs."""
    rows = getattr(layer, "own_rows", None) if isinstance(layer, MERGED) else None
    weight, bias = layer.weight.detach(), layer.bias
    return weight[:rows], None if bias is None else bias.detach()[:rows]


def _panels(bias: torch.Tensor) -> torch.Tensor:
    """[columns] -> [panels, 32] float32"""
    return pad(bias.float(), (0, -len(bias) % _PANEL)).view(-1, _PANEL)
