"""How kernels keep the numbers of a weight: one whole number that engine/native/quantized.h takes apart again.

bits 0 .. 7    of a number: 8 or 4
bit 8          numbers are E4M3 (4 bits of exponent, 3 of mantissa, no infinity)
bit 9          scales are float32, or else bfloat16
bits 16 ..     columns that share a scale; 0: 128
"""

from __future__ import annotations

GROUP = 128  # columns with one scale, at most
GROUPS = (128, 64, 32)  # that kernels know
FP8 = 8 | 1 << 8
WIDE_SCALES = 1 << 9


def of_groups(bits: int, group: int) -> int:
    """Of numbers that are kept as `bits` says, with a scale for so many."""
    assert group in GROUPS
    return bits | (0 if group == GROUP else group << 16)


def number_bits(bits: int) -> int:
    return bits & 255


def are_floats(bits: int) -> bool:
    return bool(bits & (1 << 8))


def wide_scales(bits: int) -> bool:
    return bool(bits & WIDE_SCALES)


def group_columns(bits: int) -> int:
    return bits >> 16 or GROUP


def words(bits: int) -> str:
    """For people, of the numbers alone."""
    return "fp8" if are_floats(bits) else f"int{number_bits(bits)}"
