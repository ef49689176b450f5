"""Weights of checkpoints that keep them in fewer bits, computed as they are read: in float32, or exactly in bfloat16.

    weight = (number - zero) x scale

checkpoint/quantized.py knows which tensors are what. Nothing stays packed: the model has plain weights of its own
type, as large as if the checkpoint had never been quantized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from checkpoint.quantized import Packed
from engine.model_errors import ModelLoadError

# Nibble i of a word holds column _AWQ_ORDER[i] of its eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Of the OCP Microscaling specification: E2M1, the sign in the highest bit.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS, _NO_NUMBER = 127, 255
_OUTPUTS = 1024  # that are computed at a time: numbers on their way take several times the room of what comes out
_VERSION = 1  # of the arithmetic


def identity_of(identity: str) -> str:
    """Of a model whose weights were unpacked: other arithmetic makes another model."""
    return hashlib.sha256(f"{identity}|unpack-{_VERSION}".encode()).hexdigest()[: len(identity)]


class UnpackedWeight:
    """In place of safetensors' slice of a stored tensor: `weight[...]` reads and computes it."""

    def __init__(self, packed: Packed, stored: Mapping[str, Any]) -> None:
        """`stored`: slices, by the names of `packed.parts`."""
        self._packed, self._stored = packed, stored

    def get_shape(self) -> list[int]:
        return list(self._packed.shape)

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Raises ModelLoadError."""
        first = index[0] if isinstance(index, tuple) else index
        if self._packed.method == "mxfp4" and isinstance(first, slice):  # experts: a few at a time
            rest = index[1:] if isinstance(index, tuple) else ()
            return _mxfp4({name: part[first] for name, part in self._stored.items()})[(slice(None), *rest)]
        parts = {name: part[...] for name, part in self._stored.items()}
        made = _METHODS[self._packed.method](self._packed, parts)
        if tuple(made.shape) != self._packed.shape:
            raise ModelLoadError(
                f"{self._packed.parts['numbers']} makes a weight of shape {list(made.shape)} where "
                f"{list(self._packed.shape)} is expected; download or copy the checkpoint again"
            )
        return made if index is Ellipsis else made[index]


def _scaled(packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    numbers, scales = parts["numbers"].float(), parts["scales"].float()
    if "zeros" in parts:
        numbers = numbers - _spread(parts["zeros"].float(), numbers, packed.block)
    return numbers * _spread(scales, numbers, packed.block)


def _spread(scales: torch.Tensor, numbers: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """One for each number, or what broadcasts to that."""
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.dim() == 1:
        return scales[:, None]
    for dim, size in ((-2, block[0]), (-1, block[1])):
        own, have = numbers.shape[dim], scales.shape[dim]
        if have not in (1, own):
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, own)
    return scales


def _mxfp4(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Two numbers a byte, the lower nibble first. Exact in bfloat16, but for what is below its smallest number."""
    blocks, exponents = parts["numbers"], parts["scales"].to(torch.int32) - _E8M0_BIAS
    if bool((parts["scales"] == _NO_NUMBER).any()):
        raise ModelLoadError("a scale of the experts' weights is no number; download or copy the checkpoint again")
    table = torch.tensor(_E2M1, dtype=torch.bfloat16)
    made = torch.empty(*blocks.shape[:-1], 32, dtype=torch.bfloat16)
    made[..., 0::2] = table[(blocks & 15).int()]
    made[..., 1::2] = table[(blocks >> 4).int()]
    torch.ldexp(made, exponents[..., None], out=made)
    return made.flatten(-2).transpose(1, 2).contiguous()


def _gptq(packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    most, each = (1 << packed.bits) - 1, 32 // packed.bits
    index = parts["g_idx"].long()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(parts["scales"]):
        raise ModelLoadError(f"{packed.parts['g_idx']} names groups that are not there; download the checkpoint again")

    def some(outputs: slice) -> torch.Tensor:
        numbers = _words(parts["qweight"][:, outputs].t(), packed.bits).t()  # inputs x outputs
        zeros = _words(parts["qzeros"][:, outputs.start // each : -(-outputs.stop // each)], packed.bits)
        zeros = zeros[:, : numbers.shape[1]]
        if packed.zeros_less_one:
            zeros = (zeros + 1) & most
        return ((numbers - zeros[index]).float() * parts["scales"][:, outputs].float()[index]).t()

    return _by_outputs(packed, some)


def _awq(packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    back = torch.tensor(_AWQ_ORDER).argsort()
    index = torch.arange(packed.shape[1]) // packed.block[1]

    def in_order(words: torch.Tensor) -> torch.Tensor:
        return _words(words, packed.bits).unflatten(1, (-1, 8))[:, :, back].flatten(1)

    def some(outputs: slice) -> torch.Tensor:
        words = slice(outputs.start // 8, outputs.stop // 8)
        numbers, zeros = in_order(parts["qweight"][:, words]), in_order(parts["qzeros"][:, words])
        return ((numbers - zeros[index]).float() * parts["scales"][:, outputs].float()[index]).t()

    return _by_outputs(packed, some)


def _packed(packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "shape" in parts and parts["shape"].tolist() != list(packed.shape):
        raise ModelLoadError(
            f"{packed.parts['shape']} says {parts['shape'].tolist()}, and the numbers beside it are of "
            f"{list(packed.shape)}, which is not supported; use the checkpoint in bfloat16, float16 or float32"
        )
    index = torch.arange(packed.shape[1]) // packed.block[1]
    if "g_idx" in parts and int(parts["g_idx"].min()) >= 0:
        index = parts["g_idx"].long()
        if int(index.max()) >= parts["scales"].shape[1]:
            raise ModelLoadError(f"{packed.parts['g_idx']} names groups that are not there; download it again")

    def some(outputs: slice) -> torch.Tensor:
        numbers = _words(parts["numbers"][outputs], packed.bits) - packed.offset
        if "zeros" in parts:
            each = 32 // packed.bits
            words = parts["zeros"][outputs.start // each : -(-outputs.stop // each)].t()
            zeros = _words(words, packed.bits).t()[: len(numbers)] - packed.offset
            numbers = numbers - zeros[:, index]
        return numbers.float() * parts["scales"][outputs].float()[:, index]

    return _by_outputs(packed, some)


def _by_outputs(packed: Packed, some: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    made = torch.empty(packed.shape, dtype=torch.float32)
    for start in range(0, packed.shape[0], _OUTPUTS):
        outputs = slice(start, min(start + _OUTPUTS, packed.shape[0]))
        made[outputs] = some(outputs)
    return made


def _words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers of 32-bit words along the last dimension, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


_METHODS: dict[str, Callable[[Packed, Mapping[str, torch.Tensor]], torch.Tensor]] = {
    "scaled": _scaled,
    "mxfp4": lambda _, parts: _mxfp4(parts),
    "gptq": _gptq,
    "awq": _awq,
    "packed": _packed,
}
