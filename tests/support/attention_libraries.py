"""Stand-ins for attention libraries that need a GPU: their documented signatures, plain torch behind them.

They refuse what the real ones refuse (types, layouts, sizes that do not fit), and read nothing but what they are told.
Signatures: flashinfer 0.6 (flashinfer/decode.py, prefill.py), flash_attn 2.8 (flash_attn_interface.py).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool, left: int, softcap: float
) -> torch.Tensor:
    """query [q, heads, dim], keys and values [k, kv_heads, dim] -> [q, heads, dim]; the mask ends at the last key.
    `left`: keys that a query sees before its own, -1: all.
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.float().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    key, own = torch.arange(len(keys))[None, :], torch.arange(len(query))[:, None] + len(keys) - len(query)
    if causal:
        scores = scores.masked_fill(key > own, -torch.inf)
    if left >= 0:
        scores = scores.masked_fill(key < own - left, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(query.dtype)


class _Wrapper:
    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.numel() >= 128 << 20
        assert kv_layout == "HND"
        self.planned: dict[str, Any] = {}
        self.plans = 0

    def _set(self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, **rest: Any) -> None:
        for array in (indptr, indices, last_page_len):
            assert array.dtype == torch.int32
            assert array.dim() == 1
        assert len(indptr) == len(last_page_len) + 1
        assert len(indices) == indptr[-1]
        assert ((last_page_len >= 1) & (last_page_len <= rest["page_size"])).all()
        assert rest["num_qo_heads"] % rest["num_kv_heads"] == 0
        self.planned = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len, **rest}
        self.plans += 1

    def _keys_values(self, sequence: int, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p = self.planned
        pages = p["indices"][p["indptr"][sequence] : p["indptr"][sequence + 1]].long()
        length = (len(pages) - 1) * p["page_size"] + int(p["last_page_len"][sequence])
        assert cache.shape[1:] == (2, p["num_kv_heads"], p["page_size"], p["head_dim"])
        assert cache.stride(-1) == 1
        found = cache[pages].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]  # [2, tokens, kv_heads, dim]
        return found[0], found[1]


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout)
        assert not use_cuda_graph
        self._any_group = use_tensor_cores

    def plan(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, *, window_left: int = -1,
        logits_soft_cap: float | None = None, sm_scale: float | None = None,
        q_data_type: torch.dtype = torch.float16, kv_data_type: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        assert self._any_group or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 8)
        self._set(
            indptr, indices, last_page_len, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            page_size=page_size, scale=sm_scale or head_dim**-0.5, types=(q_data_type, kv_data_type or q_data_type),
            look=(window_left, logits_soft_cap or 0.0),
        )  # fmt: skip

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor) -> torch.Tensor:
        p = self.planned
        assert (q.dtype, paged_kv_cache.dtype) == p["types"]
        assert q.shape == (len(p["last_page_len"]), p["num_qo_heads"], p["head_dim"])
        return torch.cat(
            [
                _attend(q[i : i + 1], *self._keys_values(i, paged_kv_cache), p["scale"], False, *p["look"])
                for i in range(len(q))
            ]
        )


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int,
        *, causal: bool = False, window_left: int = -1, logits_soft_cap: float | None = None,
        sm_scale: float | None = None, q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        assert qo_indptr.dtype == torch.int32
        assert len(qo_indptr) == len(paged_kv_indptr)
        self._set(
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads, head_dim=head_dim_qk, page_size=page_size, rows=qo_indptr, causal=causal,
            scale=sm_scale or head_dim_qk**-0.5, types=(q_data_type, kv_data_type or q_data_type),
            look=(window_left, logits_soft_cap or 0.0),
        )  # fmt: skip

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor) -> torch.Tensor:
        p = self.planned
        assert (q.dtype, paged_kv_cache.dtype) == p["types"]
        assert q.shape == (int(p["rows"][-1]), p["num_qo_heads"], p["head_dim"])
        bounds = p["rows"].tolist()
        return torch.cat(
            [
                _attend(q[begin:end], *self._keys_values(i, paged_kv_cache), p["scale"], p["causal"], *p["look"])
                for i, (begin, end) in enumerate(itertools.pairwise(bounds))
            ]
        )


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, *,
    block_table: torch.Tensor | None = None, page_multiple: int = 256,
) -> torch.Tensor:  # fmt: skip
    assert block_table is not None
    assert k.shape[1] % page_multiple == 0, "Paged KV cache block size must be divisible by 256"
    assert {cu_seqlens_q.dtype, cu_seqlens_k.dtype, block_table.dtype} == {torch.int32}
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.dtype == k.dtype == v.dtype
    assert dropout_p == 0
    assert window_size[1] in (-1, 0)
    rows, lengths = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    assert block_table.shape[0] == len(lengths) == len(rows) - 1
    assert (max_seqlen_q, max_seqlen_k) == (max(cu_seqlens_q.diff().tolist()), max(lengths))
    found = []
    for i, (begin, end) in enumerate(itertools.pairwise(rows)):
        pages = block_table[i, : -(-lengths[i] // k.shape[1])].long()
        keys, values = (t[pages].flatten(0, 1)[: lengths[i]] for t in (k, v))
        scale = softmax_scale or q.shape[-1] ** -0.5
        found.append(_attend(q[begin:end], keys, values, scale, causal, window_size[0], softcap))
    return torch.cat(found)
