"""Paged attention by FlashAttention 2, where it is installed. Checked around its call; not yet run on a GPU.

One call a layer for decodes and prompts alike: packed queries, keys and values through a table of pages, the causal
mask aligned at the last key. It takes strides from the tensors, so the pool is read where it lies, but its pages hold a
multiple of 256 tokens (flash_attn 2.8: "Paged KV cache block size must be divisible by 256"): engine.block_tokens
must be one, far above the default.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from engine.attention.interface import PLAIN, Chunk, Extras
from engine.attention.pages import PagesBatch, PageTable, uploaded
from kv_transfer.layout import FULL, Rule

PAGE_MULTIPLE = 256


class FlashAttnBackend:
    """Raises ImportError where flash_attn is absent or broken. `library`: the module; tests pass another."""

    name = "flash_attn"

    def __init__(self, library: Any = None) -> None:
        self._library = importlib.import_module("flash_attn") if library is None else library

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> FlashAttnBatch:
        return FlashAttnBatch(self._library, kv, chunks, rule)


class FlashAttnBatch(PagesBatch):
    def __init__(self, library: Any, kv: torch.Tensor, chunks: list[Chunk], rule: Rule) -> None:
        super().__init__(kv, chunks)
        self._library = library
        self._window = (rule.window - 1, 0) if rule.window else (-1, -1)  # how far left and right of itself
        table = PageTable(chunks, kv.shape[4], rule)
        lengths = table.lengths.cumsum()
        self._query_starts = uploaded(table.rows, kv.device)
        self._key_starts = torch.nn.functional.pad(uploaded(lengths.astype("int32"), kv.device), (1, 0))
        self._table = uploaded(table.padded(), kv.device)
        self._longest = int(table.tokens.max()), int(table.lengths.max())

    def attend_written(self, layer: int, query: torch.Tensor, scaling: float, extras: Extras = PLAIN) -> torch.Tensor:
        keys, values = (self._kv[:, layer, half].transpose(1, 2) for half in (0, 1))  # [pages, page, kv_heads, dim]
        output = self._library.flash_attn_varlen_func(
            query[0].transpose(0, 1).contiguous(),
            keys,
            values,
            self._query_starts,
            self._key_starts,
            *self._longest,
            softmax_scale=scaling,
            causal=True,
            window_size=self._window,
            softcap=extras.softcap,
            block_table=self._table,
        )
        return output[None]
