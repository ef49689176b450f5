"""What attention libraries for paged caches want to know of a step, and the writing of new keys and values.

The pool [blocks, layers, 2, kv_heads, block_tokens, head_dim] holds a page of one layer at a fixed stride, heads before
tokens. Libraries that take their pages' strides from the tensor read it where it lies.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from engine.attention.interface import PLAIN, Chunk, Extras
from kv_transfer.layout import FULL, Rule


class PageTable:
    """Compressed rows, int32: chunk i's pages are indices[indptr[i] : indptr[i + 1]], and its last one holds
    last_page_len[i] tokens (1 to block_tokens), the new ones among them. Its query rows are rows[i] to rows[i + 1].
    Pages that a window has left are no part of it: masks count from the end.
    """

    def __init__(self, chunks: Sequence[Chunk], block_tokens: int, rule: Rule = FULL) -> None:
        left = np.asarray([rule.first_block(c.start, block_tokens) for c in chunks], dtype=np.int32)
        self.tokens = np.asarray([c.num_tokens for c in chunks], dtype=np.int32)
        self.lengths = np.asarray([c.start + c.num_tokens for c in chunks], dtype=np.int32) - left * block_tokens
        pages = -(-self.lengths // block_tokens)
        self.rows = _pointers(self.tokens)
        self.indptr = _pointers(pages)
        self.indices = np.fromiter(
            chain.from_iterable(
                c.block_ids[first : first + n]
                for c, first, n in zip(chunks, left.tolist(), pages.tolist(), strict=True)
            ),
            dtype=np.int32,
            count=int(self.indptr[-1]),
        )
        self.last_page_len = self.lengths - (pages - 1) * block_tokens

    def padded(self) -> np.ndarray:
        """The same pages as a table [chunks, most pages], padded with page 0, which nobody looks at."""
        pages = np.diff(self.indptr)
        table = np.zeros((len(pages), int(pages.max(initial=1))), dtype=np.int32)
        table[np.arange(table.shape[1]) < pages[:, None]] = self.indices
        return table


def _pointers(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


def staged(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the host; pinned where it goes to a GPU, so that its copy is not waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def uploaded(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return staged(array, device).to(device, non_blocking=True)


class PoolWriter:
    """Where a step's new tokens go, the same in every layer."""

    def __init__(self, kv: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        block_tokens = kv.shape[4]
        positions = np.concatenate([np.arange(c.start, c.start + c.num_tokens) for c in chunks])
        blocks = [np.asarray(c.block_ids, dtype=np.int64)[_block_of(c, block_tokens)] for c in chunks]
        places = uploaded(np.stack((np.concatenate(blocks), positions % block_tokens)), kv.device)
        self.places = kv, places[0], places[1]  # the pool, and block and slot of each new token

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """key, value [1, kv_heads, T, head_dim]."""
        pool, blocks, slots = self.places
        by_token = pool[:, layer].permute(0, 3, 1, 2, 4)  # [blocks, block_tokens, 2, kv_heads, head_dim]
        by_token[blocks, slots] = torch.stack((key[0], value[0])).permute(2, 0, 1, 3)


class PagesBatch(abc.ABC):
    """A step whose keys and values are written first and then read in their pages (interface.WrittenBatch)."""

    def __init__(self, kv: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        self._kv = kv
        self._writer = PoolWriter(kv, chunks)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        extras: Extras = PLAIN,
    ) -> torch.Tensor:
        self._writer.write(layer, key, value)
        return self.attend_written(layer, query, scaling, extras)

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._writer.places

    @abc.abstractmethod
    def attend_written(
        self, layer: int, query: torch.Tensor, scaling: float, extras: Extras = PLAIN
    ) -> torch.Tensor: ...


def _block_of(chunk: Chunk, block_tokens: int) -> np.ndarray:
    return np.arange(chunk.start, chunk.start + chunk.num_tokens) // block_tokens
