"""Numbers of a checkpoint that kernels keep as they are: packed weights whose scales lie in a grid that kernels know.

1. `scales_of` reads a weight's scales alone, and says how its numbers would be kept (engine/kept.py): E4M3, or whole
   numbers around zero, with a scale for 128, 64 or 32 columns of a row. Scales of blocks, rows or the whole are
   repeated; those of larger groups too.
2. The weights themselves are unpacked (engine/unpack.py) as if nothing were kept, and the trial at start is of these.
3. `note` gets each layer's numbers back from its weight, and holds number x scale against the weight. Only where they
   are equal, to the last bit of the model's type, may a kernel keep them: so a zero that is not in the middle, or a
   name that means another layer, is found here, and such a layer stays unpacked.
4. Kernels then pack the numbers, and the unpacked weight is given up. What computes are the same numbers and scales;
   in bfloat16 their product is not rounded, as it is in an unpacked weight. The model's identity is the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from checkpoint.quantized import Packed
from engine.kept import FP8, GROUP, GROUPS, WIDE_SCALES, group_columns, of_groups
from engine.quantization import Quantized, pieces, quantized, rounded, set_quantized

_NUMBERS = {"F8_E4M3": FP8, "I8": 8}
_MOST_NAMES = 3  # that status lists


@dataclass(frozen=True, slots=True)
class Grid:
    """`scales` [out, groups] float32; `bits`: how its numbers are kept."""

    scales: torch.Tensor
    bits: int

    def cut(self, ranges: Mapping[int, Sequence[tuple[int, int]]]) -> Grid | None:
        """Of the rows and columns that a rank has; None where it would cut a group."""
        scales, group = self.scales, group_columns(self.bits)
        if any(start % group or end % group for start, end in ranges.get(1, ())):
            return None
        for dim, size in ((0, 1), (1, group)):
            if dim in ranges:
                scales = torch.cat([scales.narrow(dim, a // size, (b - a) // size) for a, b in ranges[dim]], dim)
        return replace(self, scales=scales.contiguous())


def scales_of(packed: Packed, stored: Mapping[str, Any]) -> Grid | None:
    """`stored`: slices of the files' tensors, by the names of `packed.parts`. None: no kernel keeps such numbers."""
    if len(packed.shape) != 2 or "zeros" in packed.parts:
        return None
    columns = packed.shape[1]
    if packed.method == "scaled":
        bits = _NUMBERS[stored["numbers"].get_dtype()]
        found = _of_blocks(stored["scales"][...].float(), packed)
    elif packed.method == "packed" and _in_order(stored, columns, packed.block[1]):
        bits, found = packed.bits, (stored["scales"][...].float(), packed.block[1])
    elif packed.method == "gptq":
        scales = stored["scales"][...].float().t()
        size = max(1, int((stored["g_idx"][...] == 0).sum()))
        if not _in_order(stored, columns, size):
            return None
        bits, found = packed.bits, (scales, size)
    else:
        return None
    if found is None:
        return None
    scales, size = found
    group = GROUP if size >= columns else math.gcd(size, GROUP)
    if group not in GROUPS:
        return None
    scales = scales.repeat_interleave(-(-min(size, columns) // group), 1)[:, : -(-columns // group)].contiguous()
    scales = torch.where(scales == 0, 1.0, scales)  # of a group of zeros
    wide = 0 if torch.equal(scales, scales.bfloat16().float()) else WIDE_SCALES
    return Grid(scales, of_groups(bits, group) | wide)


def _of_blocks(scales: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, int] | None:
    """A row of scales for each row, and how many columns share one."""
    rows, columns = packed.shape
    if scales.dim() < 2:
        scales = scales.reshape(-1, 1)
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(rows, 1), columns
    if len(scales) not in (1, rows):
        scales = scales.repeat_interleave(packed.block[0], 0)[:rows]
    size = columns if scales.shape[1] == 1 else packed.block[1]
    return (scales.expand(rows, -1), size) if size else None  # 0: each column has its own


def _in_order(stored: Mapping[str, Any], columns: int, size: int) -> bool:
    """Whether neighbours share a scale: nothing was sorted by its activations (act-order)."""
    if "g_idx" not in stored:
        return True
    index = stored["g_idx"][...].long()
    return bool((index < 0).all()) or torch.equal(index, torch.arange(columns) // size)


@dataclass(frozen=True, slots=True)
class Stored:
    """`words`: how the checkpoint keeps weights; `names`: of all that it keeps so, as paths of the model's layers."""

    words: str
    names: frozenset[str]

    def described(self, small: Quantized) -> str:
        """For status and the log: which of them are kept, and which unpacked."""
        kept = self.names & {_stored_as(path) for path in small.kept - small.paths}
        others = self.names - kept
        if not kept:
            return f"weights unpacked from {self.words}"
        if not others:
            return f"weights kept as they are stored ({self.words})"
        unpacked = f"{len(others)} unpacked ({_listed(others)})"
        return f"{len(kept)} weights kept as they are stored ({self.words}), {unpacked}"


def _listed(names: Iterable[str]) -> str:
    """model.layers.7.mlp.up_proj and its like are one."""
    kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names})
    more = f" and {len(kinds) - _MOST_NAMES} more" if len(kinds) > _MOST_NAMES else ""
    return ", ".join(kinds[:_MOST_NAMES]) + more


@torch.no_grad()
def note(model: Any, stored: Stored, grids: Mapping[str, Grid]) -> Quantized:
    """Which layers' numbers kernels may keep. `grids`: by path of the layer."""
    found = quantized(model) or Quantized(None, frozenset(), {}, {})
    for path, layer in model.named_modules():
        grid = None if path in found.paths else grids.get(_stored_as(path))  # rounded once more
        if grid is not None and type(layer) is nn.Linear and _stands_for(grid, layer.weight):
            found.scales[path], found.bits[path] = grid.scales, grid.bits
    found = replace(found, stored=stored)
    set_quantized(model, found)
    return found


def _stored_as(path: str) -> str:
    """The path before ranks put something around the layer that has the layer's name (engine/ranks/joined.py)."""
    around, _, name = path.rpartition(".")
    return around if around.rpartition(".")[2] == name else path


def _stands_for(grid: Grid, weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or len(weight) != len(grid.scales):
        return False
    if -(-weight.shape[1] // group_columns(grid.bits)) != grid.scales.shape[1]:
        return False
    return all(
        torch.equal(rounded(weight[rows], grid.scales[rows], grid.bits), weight[rows]) for rows in pieces(len(weight))
    )
