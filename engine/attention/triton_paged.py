"""Paged attention in Triton kernels. Checked through Triton's interpreter; not yet run on a GPU.

A layer of a step is at most four launches, however many sequences the step holds:

    1  write       new keys and values -> pool                    one program a token
    2  attend      prompts and chunks of prompts -> output        one program a tile of rows and key head
    3  attend      few new tokens -> one partial answer a split   one program a tile, a split and key head
    4  reduce      partial answers -> output                      one program a tile and key head

A tile's rows are (new token, query head) pairs that share one key head, so grouped heads read each key once. Launches 3
and 4 serve decode and multi-token verify: the context is cut into splits that run side by side, and the reduction
joins them in order. Tile and split sizes depend on the model and never on the batch, and a key that a row may not
see changes nothing in it: a token's result is the same whatever its neighbours are, and a verified token's is that of
the same token decoded alone. Prompts take another order of summation, so they agree with decode to rounding only.
Under a window or a chunk a tile begins where the first of its rows looks, and reads nothing before that.

Import this file only where it is used (engine/attention/choose.py): Triton may be absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from engine.attention.interface import PLAIN, Chunk, Extras
from engine.attention.triton_kernels import TILE_FIELDS, attend_kernel, reduce_kernel, write_kernel
from kv_transfer.layout import FULL, Rule

# A chunk of at most so many tokens after a context takes the split path; more keep a GPU busy without splits.
FEW_TOKENS = 8
WIDEST, WIDEST_LATENT = 256, 640  # elements of a key


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the work, fixed for a model: powers of two, at least 16 (a matrix product's least), except where said.

    `rows` and `few_rows`: (token, head) pairs in a tile of a prompt, and of a few tokens. `keys`: keys folded at once.
    `split_tokens`: keys in a split, a multiple of `keys`. None of them has been tuned on a GPU.
    """

    rows: int
    few_rows: int
    keys: int
    split_tokens: int = 256

    def __post_init__(self) -> None:
        if self.split_tokens % self.keys:
            raise ValueError(f"split_tokens ({self.split_tokens}) must be a multiple of keys ({self.keys})")

    @classmethod
    def of(cls, group: int, head_dim: int, element_bytes: int) -> Sizes:
        """For `group` query heads a key head, which share a latent key of 512 and more. A tile of keys takes at most 16
        KiB, so that two stages of keys and values fit beside a query tile in the shared memory of any GPU since compute
        capability 8.0 (99 KiB).
        """
        head_bytes = _padded(head_dim) * element_bytes
        keys = max(16, min(64, 16384 // head_bytes))
        rows = 64 if head_bytes <= 512 else 32
        return cls(rows=rows, few_rows=max(16, min(rows, _padded(group, 1))), keys=keys)


class TritonBackend:
    """Source of `sizes` when None: Sizes.of. Tests pass small ones, to cross their borders with short contexts."""

    name = "triton paged"

    def __init__(self, sizes: Sizes | None = None) -> None:
        self._sizes = sizes

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> TritonBatch:
        """`kv` [num_blocks, layers, 2, kv_heads, block_tokens, head_dim]: any strides but the last, which is 1.

        Raises ValueError for a head_dim above 256 (latent: above 640) or not contiguous, and for no chunks.
        """
        widest = WIDEST_LATENT if rule.values else WIDEST
        if kv.stride(-1) != 1 or kv.shape[-1] > widest:
            raise ValueError(f"head_dim must be contiguous and at most {widest}; this pool is {tuple(kv.shape)}")
        if not chunks:
            raise ValueError("a step without chunks has nothing to attend to")
        return TritonBatch(kv, chunks, self._sizes, rule)

    def splits(self, chunk: Chunk) -> int:
        """Splits of a chunk's context; they depend on no model."""
        size = Sizes.split_tokens if self._sizes is None else self._sizes.split_tokens
        return -(-(chunk.start + chunk.num_tokens) // size)

    def static(self, kv: torch.Tensor, batch: int, splits: int, table_blocks: int) -> StaticDecodes:
        """For graphs: up to `batch` decodes of at most `splits` splits and `table_blocks` blocks each."""
        return StaticDecodes(kv, batch, splits, table_blocks, self._sizes)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Tables on the device, int32: what each program works on, for one ratio of query heads to key heads."""

    sizes: Sizes
    prompt_tiles: torch.Tensor
    few_tiles: torch.Tensor
    items: torch.Tensor
    num_prompt_tiles: int
    num_few_tiles: int
    num_items: int
    partial: torch.Tensor
    partial_log2: torch.Tensor


class TritonBatch:
    """One step. Chunks are packed in order, without gaps, as engine/attention/interface.py says."""

    def __init__(self, kv: torch.Tensor, chunks: list[Chunk], sizes: Sizes | None, rule: Rule) -> None:
        self._keep(kv, sizes, rule)
        facts = np.asarray([(c.first_row, c.num_tokens, c.start, len(c.block_ids)) for c in chunks], dtype=np.int64)
        first_row, num_tokens, start, num_blocks = facts.T
        if (num_blocks * self._block_tokens < start + num_tokens).any():
            raise ValueError("a chunk has fewer blocks than its tokens need")
        ids = np.fromiter(chain.from_iterable(c.block_ids for c in chunks), dtype=np.int32, count=num_blocks.sum())
        table = _starts(num_blocks)
        self._num_tokens = int(num_tokens.sum())
        positions = np.arange(self._num_tokens) + np.repeat(start - _starts(num_tokens), num_tokens)
        blocks = ids[np.repeat(table, num_tokens) + positions // self._block_tokens]
        self._blocks, self._slots, self._block_ids = self._upload(blocks, positions % self._block_tokens, ids)
        # first row, new tokens, start, place of its blocks in block_ids: one line a chunk
        self._chunks = np.stack((first_row, num_tokens, start, table), axis=1)

    def _keep(self, kv: torch.Tensor, sizes: Sizes | None, rule: Rule) -> None:
        _, _, _, self._kv_heads, self._block_tokens, self._head_dim = kv.shape
        self._kv = kv
        block, layer, half, head, slot, _ = kv.stride()
        self._strides = (block, layer, 0 if rule.values else half, head, slot)
        self._sizes = sizes
        self._rule = rule
        self._value_dim = rule.values or self._head_dim
        self._plans: dict[int, _Plan] = {}

    def _upload(
        self, first: np.ndarray, second: np.ndarray, third: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One copy to the device. Each part begins at 16 bytes: kernels are compiled anew for other alignments."""
        at_second = -(-first.size // 4) * 4
        at_third = at_second + -(-second.size // 4) * 4
        packed = np.zeros(at_third + third.size, dtype=np.int32)
        for place, array in ((0, first), (at_second, second), (at_third, third)):
            packed[place : place + array.size] = array.reshape(-1)
        staged = torch.from_numpy(packed)
        if self._kv.is_cuda:
            staged = staged.pin_memory()
        on_device = staged.to(self._kv.device, non_blocking=True)
        return on_device, on_device[at_second:], on_device[at_third:]

    def _plan(self, group: int) -> _Plan:
        """Once a step and ratio: a model's layers share it."""
        if group in self._plans:
            return self._plans[group]
        sizes = self._sizes or Sizes.of(group, self._value_dim, self._kv.element_size())
        few = (self._chunks[:, 2] > 0) & (self._chunks[:, 1] <= FEW_TOKENS)
        prompt_tiles = _tiles(self._chunks[~few], group, sizes.rows)
        few_tiles = _tiles(self._chunks[few], group, sizes.few_rows)
        first_split = self._first(few_tiles[:, 2]) // sizes.split_tokens
        splits = -(-(few_tiles[:, 1] + few_tiles[:, 2]) // sizes.split_tokens) - first_split
        pairs = np.minimum(few_tiles[:, 1] * group - few_tiles[:, 4], sizes.few_rows) * splits
        few_tiles[:, 5], few_tiles[:, 6] = _starts(pairs), splits
        num_items = int(splits.sum())
        split = np.arange(num_items) - np.repeat(_starts(splits) - first_split, splits)
        items = np.stack((np.repeat(np.arange(len(few_tiles)), splits), split * sizes.split_tokens), axis=1)
        on_device = self._upload(prompt_tiles, few_tiles, items)
        partial = torch.empty(int(pairs.sum()), self._kv_heads, self._value_dim, device=self._kv.device)
        counts = (len(prompt_tiles), len(few_tiles), num_items)
        plan = _Plan(sizes, *on_device, *counts, partial, torch.empty_like(partial[:, :, 0]))
        self._plans[group] = plan
        return plan

    def _first(self, positions: np.ndarray) -> np.ndarray:
        """kv_transfer.layout.Rule.first of many."""
        if self._rule.window:
            return np.maximum(0, positions - self._rule.window + 1)
        return positions // self._rule.chunk * self._rule.chunk if self._rule.chunk else np.zeros_like(positions)

    def _new_output(self, query: torch.Tensor) -> torch.Tensor:
        _, heads, num_tokens, _ = query.shape
        return torch.empty((1, num_tokens, heads, self._value_dim), dtype=query.dtype, device=query.device)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        extras: Extras = PLAIN,
    ) -> torch.Tensor:
        """query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim] -> [1, T, heads, value_dim].

        softmax(scaling * Q K^T + mask) V over each sequence's own keys. Writes key and value into the pool first. Any
        strides but the last. Raises ValueError for shapes that do not fit the step.
        """
        _, heads, num_tokens, head_dim = query.shape
        expected = (1, self._kv_heads, self._num_tokens, self._head_dim)
        value = key if self._rule.values else value
        if key.shape != expected or value.shape != expected or heads % self._kv_heads or head_dim != self._head_dim:
            raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit the step's {expected}")
        key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
        with torch.cuda.device_of(query):  # Triton launches on the current device
            _launch(
                write_kernel, (num_tokens,), self._kv, key, value, self._blocks, self._slots, layer, *self._strides,
                key.stride(1), key.stride(2), value.stride(1), value.stride(2),
                HEADS=self._kv_heads, HEADS_PADDED=_padded(self._kv_heads, 1),
                DIM=head_dim, DIM_PADDED=_padded(head_dim), LATENT=self._rule.values > 0,
            )  # fmt: skip
        return self.attend_written(layer, query, scaling, extras)

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pool, and block and slot of each new token [T]; block -1: nowhere. For who writes keys and values."""
        return self._kv, self._blocks, self._slots

    def attend_written(self, layer: int, query: torch.Tensor, scaling: float, extras: Extras = PLAIN) -> torch.Tensor:
        """`attend`, where keys and values are in the pool already."""
        query = query if query.stride(-1) == 1 else query.contiguous()
        group = query.shape[1] // self._kv_heads
        plan, rule, dim = self._plan(group), self._rule, self._value_dim
        sizes, rest = plan.sizes, self._head_dim - self._value_dim
        output = self._new_output(query)
        scale, cap = scaling * math.log2(math.e), extras.softcap * math.log2(math.e)
        if extras.softcap:  # what 2^x is taken of on the way to the tangent
            scale *= 2 / extras.softcap
        grouped = {"GROUP": group, "KV_HEADS": self._kv_heads, "DIM": dim, "DIM_PADDED": _padded(dim)}
        grouped["SINKS"] = extras.sinks is not None
        attend = grouped | {
            "REST": rest, "REST_PADDED": _padded(max(1, rest)), "WINDOW": rule.window, "CHUNK": rule.chunk,
            "CAPPED": extras.softcap > 0, "BLOCK_TOKENS": self._block_tokens, "KEYS": sizes.keys, "num_stages": 2,
        }  # fmt: skip
        sinks = query if extras.sinks is None else extras.sinks  # a tensor in any case
        outputs = (output, plan.partial, plan.partial_log2)
        strides = (query.stride(1), query.stride(2), *self._strides)
        where = (self._block_ids, sinks, layer, scale, cap, *strides)
        with torch.cuda.device_of(query):
            if plan.num_prompt_tiles:
                _launch(
                    attend_kernel, (plan.num_prompt_tiles, self._kv_heads),
                    *outputs, query, self._kv, plan.prompt_tiles, plan.items, *where,
                    ROWS=sizes.rows, SPLIT_TOKENS=0, **attend,
                )  # fmt: skip
            if plan.num_few_tiles:
                _launch(
                    attend_kernel, (plan.num_items, self._kv_heads),
                    *outputs, query, self._kv, plan.few_tiles, plan.items, *where,
                    ROWS=sizes.few_rows, SPLIT_TOKENS=sizes.split_tokens, **attend,
                )  # fmt: skip
                grid = (plan.num_few_tiles, self._kv_heads)
                _launch(reduce_kernel, grid, *outputs, plan.few_tiles, sinks, ROWS=sizes.few_rows, **grouped)
        return output


class StaticDecodes(TritonBatch):
    """Decodes whose every launch depends on the shape (batch, splits) alone: what a CUDA graph can replay.

    The tables are those of TritonBatch at places that do not move: row i is tile i (or tiles i * n .. when a key head
    has more heads than a tile has rows), its blocks begin at i * table_blocks, and it has `splits` items, of which
    those behind its context find nothing to do. Rows without a sequence have no new tokens and block -1.
    """

    def __init__(self, kv: torch.Tensor, batch: int, splits: int, table_blocks: int, sizes: Sizes | None) -> None:
        self._keep(kv, sizes, FULL)
        self._num_tokens = self._batch = batch
        self._splits = splits
        self._table_blocks = table_blocks
        self._lengths = np.zeros(batch, dtype=np.int64)
        self._blocks = torch.full((batch,), -1, dtype=torch.int32, device=kv.device)
        self._slots = torch.zeros(batch, dtype=torch.int32, device=kv.device)
        self._block_ids = torch.zeros(batch * table_blocks, dtype=torch.int32, device=kv.device)

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Raises ValueError for what this shape does not hold."""
        block_tokens = self._block_tokens
        lengths = np.zeros(self._batch, dtype=np.int64)
        writes = np.full((2, self._batch), -1, dtype=np.int32)
        tables = np.zeros((self._batch, self._table_blocks), dtype=np.int32)
        used = 0
        for row, chunk in enumerate(chunks):
            blocks = chunk.start // block_tokens + 1
            if row >= self._batch or chunk.num_tokens != 1 or blocks > self._table_blocks:
                raise ValueError(f"{chunk} does not fit {self._batch} decodes of {self._table_blocks} blocks")
            tables[row, :blocks] = chunk.block_ids[:blocks]
            writes[:, row] = chunk.block_ids[blocks - 1], chunk.start % block_tokens
            lengths[row] = chunk.start + 1
            used = max(used, blocks)
        self._lengths = lengths
        self._copy(self._blocks, writes[0])
        self._copy(self._slots, np.maximum(writes[1], 0))
        ids = self._block_ids.view(self._batch, self._table_blocks)
        self._copy(ids[:, :used], tables[:, :used])
        for group, plan in self._plans.items():
            self._copy(plan.few_tiles, self._tile_table(group, plan.sizes))

    def _copy(self, to: torch.Tensor, values: np.ndarray) -> None:
        staged = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
        to.copy_(staged.pin_memory() if to.is_cuda else staged, non_blocking=True)

    def _tile_table(self, group: int, sizes: Sizes) -> np.ndarray:
        tiles_a_row = -(-group // sizes.few_rows)
        rows = np.repeat(np.arange(self._batch), tiles_a_row)
        here = self._lengths[rows]
        table = np.zeros((len(rows), TILE_FIELDS.value), dtype=np.int32)
        table[:, 0] = rows
        table[:, 1] = here > 0
        table[:, 2] = np.maximum(here - 1, 0)
        table[:, 3] = rows * self._table_blocks
        table[:, 4] = np.tile(np.arange(tiles_a_row), self._batch) * sizes.few_rows
        table[:, 5] = np.arange(len(rows)) * self._splits * sizes.few_rows
        table[:, 6] = -(-here // sizes.split_tokens)
        return table

    def _plan(self, group: int) -> _Plan:
        if group in self._plans:
            return self._plans[group]
        device = self._kv.device
        sizes = self._sizes or Sizes.of(group, self._head_dim, self._kv.element_size())
        tiles = self._tile_table(group, sizes)
        item = np.arange(len(tiles) * self._splits)
        items = np.stack((item // self._splits, item % self._splits * sizes.split_tokens), axis=1).astype(np.int32)
        few_tiles = torch.empty(tiles.shape, dtype=torch.int32, device=device)
        self._copy(few_tiles, tiles)
        partial = torch.zeros(len(item) * sizes.few_rows, self._kv_heads, self._head_dim, device=device)
        on_device = (few_tiles[:0], few_tiles, torch.from_numpy(items).to(device))
        plan = _Plan(sizes, *on_device, 0, len(tiles), len(item), partial, torch.zeros_like(partial[:, :, 0]))
        self._plans[group] = plan
        return plan

    def _new_output(self, query: torch.Tensor) -> torch.Tensor:
        """Zeros: no program writes the rows of padding, and the layers after attention compute with them."""
        _, heads, num_tokens, head_dim = query.shape
        return torch.zeros((1, num_tokens, heads, head_dim), dtype=query.dtype, device=query.device)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: int) -> None:
    """Triton types a kernel's parameters as its body sees them, not as a launch gives them."""
    kernel[grid](*arguments, **constants)


def _tiles(chunks: np.ndarray, group: int, rows: int) -> np.ndarray:
    """Chunks [n, 4] cut into tiles of `rows` (token, head) pairs -> [tiles, 7]; the last two fields are left zero."""
    counts = -(-chunks[:, 1] * group // rows)
    tiles = np.zeros((int(counts.sum()), TILE_FIELDS.value), dtype=np.int64)
    tiles[:, :4] = np.repeat(chunks, counts, axis=0)
    tiles[:, 4] = (np.arange(len(tiles)) - np.repeat(_starts(counts), counts)) * rows
    return tiles


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def _padded(size: int, least: int = 16) -> int:
    """The power of two at or above `size`, at least `least`."""
    return max(least, 1 << (size - 1).bit_length())
