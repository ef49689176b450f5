"""Paged attention by FlashInfer, where it is installed. Checked around its calls; not yet run on a GPU.

Decodes go through its decode wrapper, chunks of prompts through its prefill wrapper, both planned once a step. The pool
is its "HND" layout as it lies: kv[:, layer] is [pages, 2, kv_heads, page_size, head_dim], and the kernels take the
stride between pages from the tensor (API as of flashinfer 0.6: docs.flashinfer.ai, decode and prefill).

A plan's tables leave the host through a pinned buffer that the wrapper keeps, and with overlapping steps the next plan
is made before the device is done with this one. So steps take turns between two sets of wrappers: a set is planned
again only after the step that used it has been waited for.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from engine.attention.interface import PLAIN, Chunk, Extras, decodes_first
from engine.attention.pages import PagesBatch, PageTable, staged, uploaded
from kv_transfer.layout import FULL, Rule

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends; plans of one stream may share it


class FlashInferBackend:
    """Raises ImportError where flashinfer is absent or broken. `library`: the module; tests pass another."""

    name = "flashinfer"

    def __init__(self, library: Any = None) -> None:
        self._library = importlib.import_module("flashinfer") if library is None else library
        self._sets: list[tuple[Any, Any]] = []  # (decode, prefill) wrappers
        self._group = 0  # query heads a key head, which a decode wrapper is made for
        self._turn = 0

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> FlashInferBatch:
        self._turn ^= 1
        return FlashInferBatch(self, self._turn, kv, chunks, rule)

    def wrappers(self, turn: int, device: torch.device, group: int) -> tuple[Any, Any]:
        if group != self._group:
            workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            # Groups other than these have no kernel of the simple kind, and large ones are faster on matrix units.
            matrix_units = group not in (1, 2)
            self._sets = [
                (
                    self._library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=matrix_units),
                    self._library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND"),
                )
                for _ in range(2)
            ]
            self._group = group
        return self._sets[turn]


class FlashInferBatch(PagesBatch):
    def __init__(
        self, backend: FlashInferBackend, turn: int, kv: torch.Tensor, chunks: list[Chunk], rule: Rule
    ) -> None:
        super().__init__(kv, chunks)
        self._backend, self._turn, self._rule = backend, turn, rule
        count = decodes_first(chunks)
        self._decodes, self._prompts = chunks[:count], chunks[count:]
        self._planned: tuple[int, float, float] | None = None
        self._wrappers: tuple[Any, Any] = (None, None)

    def _plan(self, heads: int, scaling: float, softcap: float) -> None:
        """Once a step: all layers have one number of heads, one scaling and one soft cap."""
        if self._planned == (heads, scaling, softcap):
            return
        _, _, _, kv_heads, block_tokens, head_dim = self._kv.shape
        device, dtype = self._kv.device, self._kv.dtype
        self._wrappers = decode, prefill = self._backend.wrappers(self._turn, device, heads // kv_heads)
        shape = (heads, kv_heads, head_dim, block_tokens)
        options = {
            "sm_scale": scaling,
            "logits_soft_cap": softcap,  # 0: none
            "window_left": self._rule.window - 1,  # -1: none
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }
        for wrapper, chunks in ((decode, self._decodes), (prefill, self._prompts)):
            if not chunks:
                continue
            table = PageTable(chunks, block_tokens, self._rule)
            pages = (
                staged(table.indptr, device),  # planned on the host
                uploaded(table.indices, device),
                staged(table.last_page_len, device),
            )
            if wrapper is decode:
                wrapper.plan(*pages, *shape, **options)
            else:
                wrapper.plan(staged(table.rows, device), *pages, *shape, causal=True, **options)
        self._planned = heads, scaling, softcap

    def attend_written(self, layer: int, query: torch.Tensor, scaling: float, extras: Extras = PLAIN) -> torch.Tensor:
        _, heads, num_tokens, head_dim = query.shape
        self._plan(heads, scaling, extras.softcap)
        decode, prefill = self._wrappers
        rows = query[0].transpose(0, 1).contiguous()  # [T, heads, head_dim]
        pages = self._kv[:, layer]
        count = len(self._decodes)
        if not self._prompts:
            return decode.run(rows, pages)[None]
        if not count:
            return prefill.run(rows, pages)[None]
        output = rows.new_empty(num_tokens, heads, head_dim)
        output[:count] = decode.run(rows[:count], pages)
        output[count:] = prefill.run(rows[count:], pages)
        return output[None]
