"""Packs quantized weights for the native kernels (quantized.h): scales, then small numbers, panel by panel.

A word of the kernels holds two neighbours in K of one column; words lie row after row, 32 columns each. Numbers of 8
bits lie in that order. Of 4 bits, four pieces of 16 words share 64 bytes: the first has the lowest bits of each half.
`bits` says how numbers are kept (engine/kept.py).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from engine.kept import group_columns, number_bits, wide_scales
from engine.native.library import Library
from engine.quantization import numbers, pieces

_PANEL = 32
_BLOCK = 32  # rows of K


Scaled = tuple[torch.Tensor, torch.Tensor | None]  # a weight, and its scales where it is quantized


def joined(*weights: Scaled) -> Scaled:
    """As one weight, row after row. All are quantized, or none."""
    scales = [s for _, s in weights if s is not None]
    return torch.cat([weight for weight, _ in weights]), torch.cat(scales) if scales else None


def room_of(bits: int, *weights: Scaled) -> tuple[int, int, int]:
    """Of quantized weights of one shape, packed: panels, weights, bytes of a panel."""
    n, k = weights[0][0].shape
    return -(-n // _PANEL), len(weights), _panel_bytes(k, bits)


def pack_in_turn(bits: int, out: torch.Tensor, *weights: Scaled) -> None:
    """A panel of each in turn. `out`: uint8, as room_of says."""
    for turn, (weight, scales) in enumerate(weights):
        assert scales is not None, "all are quantized"
        for rows in pieces(len(weight)):
            panels = slice(rows.start // _PANEL, -(-rows.stop // _PANEL))
            out[panels, turn] = panels_of(numbers(weight[rows], scales[rows], bits), scales[rows], bits)


def packed(library: Library, bits: int, *weights: Scaled) -> torch.Tensor:
    """As Library.pack_experts, of one expert."""
    if weights[0][1] is None:
        return library.pack_experts([[weight.contiguous() for weight, _ in weights]])
    out = torch.empty(room_of(bits, *weights), dtype=torch.uint8)
    library.large_pages(out)
    pack_in_turn(bits, out, *weights)
    return out.flatten()


def panels_of(numbers: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """numbers [n, k] int8 or E4M3, scales [n, groups] -> [panels, bytes of one] uint8"""
    n, k = numbers.shape
    groups, columns = scales.shape[1], group_columns(bits)
    whole = pad(numbers.view(torch.int8), (0, groups * columns - k, 0, -n % _PANEL)).unflatten(0, (-1, _PANEL))
    # [panels, columns, K] -> [panels, blocks, pairs of rows, halves of columns, columns, rows of a pair]
    ordered = whole.unflatten(2, (-1, 16, 2)).unflatten(1, (2, 16)).permute(0, 3, 4, 1, 2, 5)
    small = _bytes_of_8(ordered) if number_bits(bits) == 8 else _bytes_of_4(ordered)
    # A panel's scales of a group: [panels, groups, bytes]
    factors = pad(scales.t(), (0, -n % _PANEL), value=1.0).unflatten(1, (-1, _PANEL)).transpose(0, 1)
    factors = factors.float() if wide_scales(bits) else factors.bfloat16()
    heads = factors.contiguous().view(torch.uint8)
    joined = torch.cat([heads, small.unflatten(1, (groups, columns // _BLOCK)).flatten(2)], dim=2).flatten(1)
    return joined[:, : _panel_bytes(k, bits)].contiguous()


def _panel_bytes(k: int, bits: int) -> int:
    """Scales, and numbers up to the last block that has any."""
    scales = -(-k // group_columns(bits)) * _PANEL * (4 if wide_scales(bits) else 2)
    return scales + -(-k // _BLOCK) * _BLOCK * _PANEL * number_bits(bits) // 8


def _bytes_of_8(ordered: torch.Tensor) -> torch.Tensor:
    """[panels, blocks, 1024]"""
    return ordered.flatten(2).contiguous().view(torch.uint8)


def _bytes_of_4(ordered: torch.Tensor) -> torch.Tensor:
    """[panels, blocks, 512]"""
    quarters = (ordered.to(torch.int32) + 8).flatten(2).unflatten(2, (-1, 4, 32))  # [.., 64 bytes, piece, half word]
    shifted = quarters << torch.tensor([0, 4, 8, 12], dtype=torch.int32)[:, None]
    return shifted.sum(3).to(torch.int16).contiguous().view(torch.uint8).flatten(2)
