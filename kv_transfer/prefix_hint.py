"""Hints: 8-byte names of prompt prefixes, for the router's index of who holds what.

Block names (block_hash.py) decide whether KV is reused, so they are cryptographic, and naming a prompt of 128k tokens
costs several milliseconds. A router only wants to know who *probably* holds a prefix. It names the same blocks a second
time by a sum that is taken in a few passes over an array:

    sum(i)  = sum over the tokens t of the first i+1 blocks of (token + 1) * weight(position), modulo 2^64
    hint(i) = mix(sum(i) xor root)

Weights are odd and pseudo-random by position, so two prompts that differ in one token never have equal sums; that any
two do is a chance of about 2^-63, or somebody's will. A false hit costs time, never correctness
(docs/decisions/0013-prefix-hints.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kv_transfer.block_hash import root_hash

Hints = npt.NDArray[np.uint64]

_M1, _M2, _M3 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53), np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(33)
_ONE = np.uint64(1)
# Weights by position, and the sum of those before a position (the "+ 1" of every token). Grows, never changes; one
# tuple, because several threads may come by.
_table: tuple[Hints, Hints] = (np.zeros(0, dtype=np.uint64), np.zeros(1, dtype=np.uint64))


def hint_root(identity: str, block_tokens: int, salt: str, *, long: bool = False, adapter: str = "") -> int:
    """Differs between models, block sizes, tenants, rotary tables and adapters, as root_hash does."""
    return int.from_bytes(root_hash(identity, block_tokens, salt, long=long, adapter=adapter)[:8], "little")


def prefix_hints(tokens: Sequence[int] | npt.NDArray[np.uint32], block_tokens: int, root: int) -> Hints:
    """The hint of every full block of `tokens`. Give an array: turning a list into one costs more than all the rest."""
    return HintChain(block_tokens, root).extend(tokens)


class HintChain:
    """Hints of a sequence that grows: `extend` takes the tokens after those that it has seen."""

    __slots__ = ("_block_tokens", "_root", "_sum", "blocks")

    def __init__(self, block_tokens: int, root: int) -> None:
        self._block_tokens = block_tokens
        self._root = np.uint64(root)
        self._sum = np.uint64(0)
        self.blocks = 0

    def extend(self, tokens: Sequence[int] | npt.NDArray[np.uint32]) -> Hints:
        """Hints of the full blocks of `tokens`; what is left over is to be given again."""
        size, first = self._block_tokens, self.blocks
        count = len(tokens) // size
        if count == 0:
            return np.zeros(0, dtype=np.uint64)
        start, end = first * size, (first + count) * size
        weights, constants = _weights_up_to(end)
        array = np.asarray(tokens[: count * size], dtype=np.uint32)
        sums = (array * weights[start:end]).reshape(count, size).sum(axis=1, dtype=np.uint64)
        np.cumsum(sums, out=sums)
        sums += self._sum
        self._sum = sums[-1]
        self.blocks += count
        return _mix((sums + constants[start + size : end + 1 : size]) ^ self._root)


def _mix(x: Hints) -> Hints:
    """MurmurHash3's finalizer: every bit of the result depends on every bit of `x`. 0 stays free: it means "none"."""
    x ^= x >> _SHIFT
    x *= _M1
    x ^= x >> _SHIFT
    x *= _M2
    x ^= x >> _SHIFT
    return np.maximum(x, _ONE)


def _weights_up_to(count: int) -> tuple[Hints, Hints]:
    global _table
    table = _table
    if count > len(table[0]):
        size = max(8192, 1 << (count - 1).bit_length())
        weights = _mix(np.arange(1, size + 1, dtype=np.uint64) * _M3) | _ONE
        constants = np.zeros(size + 1, dtype=np.uint64)
        np.cumsum(weights, out=constants[1:])
        table = _table = weights, constants
    return table
