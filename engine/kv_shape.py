"""The KV memory of an engine: a pool for each group of its layout (kv_transfer/layout.py)."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.native.library import ask_for_large_pages
from kv_transfer.layout import FULL, Group

# One tensor where all layers keep everything in one shape: the pool of a group, [num_blocks, *group.block_shape()].
# Otherwise one for each group, in the layout's order.
KvPool = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class KvShape:
    groups: tuple[Group, ...]
    block_tokens: int

    @property
    def is_plain(self) -> bool:
        """All layers keep everything, in one shape."""
        return len(self.groups) == 1 and self.groups[0].rule == FULL

    @property
    def plain(self) -> tuple[int, ...]:
        """Of a plain pool, without blocks: [layers, 2, kv_heads, block_tokens, head_dim]."""
        assert self.is_plain
        return self.groups[0].block_shape(self.block_tokens)

    def pool(self, blocks: Sequence[int], device: torch.device) -> KvPool:
        """`blocks`: by group. Zeros: padding may read what nobody wrote, and a NaN there would survive a mask."""
        pools = tuple(
            zeroed((count, *group.block_shape(self.block_tokens)), pool_dtype(group), device)
            for group, count in zip(self.groups, blocks, strict=True)
        )
        return pools[0] if self.is_plain else pools


def pool_dtype(group: Group) -> torch.dtype:
    return torch.uint8 if group.rule.state or group.rounding else getattr(torch, group.dtype)


def parts(kv: KvPool) -> tuple[torch.Tensor, ...]:
    return kv if isinstance(kv, tuple) else (kv,)


def zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """In main memory the operating system gives a page when it is first written: a pool takes what was used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pool = torch.frombuffer(pages, dtype=dtype).view(shape)  # keeps `pages` alive
    ask_for_large_pages(pool)
    return pool


class Copying(Protocol):
    @property
    def copies(self) -> Sequence[tuple[int, int]]:
        """Of blocks, (from, to), by the numbers of all pools together."""
        ...


def copied(kv: KvPool, chunks: Sequence[Copying]) -> KvPool:
    """`kv` itself, when the chunks' blocks are copied. On CUDA that is done in turn with the steps."""
    pairs = [pair for chunk in chunks for pair in chunk.copies]
    first = 0
    for pool in parts(kv) if pairs else ():
        end = first + len(pool)
        here = [(source - first, target - first) for source, target in pairs if first <= target < end]
        if here:
            source, target = torch.tensor(here, device=pool.device).T
            pool[target] = pool[source]
        first = end
    return kv
