"""Paged attention from torch's own operators: gathers a sequence's blocks, then scaled-dot-product attention.

Runs on every device; the backend of CPU. The pool is looked at as rows, so that one gather delivers
[kv_heads, tokens, head_dim] without a second copy:

    row of a block's head   ((block * layers + layer) * 2 + k_or_v) * kv_heads + head          [block_tokens * head_dim]
    row of one token        row of its block's head * block_tokens + slot                      [head_dim]

Indices of all layers are built once a step, keys and values together: a layer costs one gather and one write. Of a
rounded group (engine/kv_rounding.py) a token's row has its key and its value.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from engine.attention.interface import PLAIN, Chunk, Extras, decodes_first
from engine.kv_rounding import RoundedRows
from kv_transfer.layout import FULL, Rule


class GatherBackend:
    """`rows`: of a rounded group."""

    name = "torch gather + sdpa"

    def __init__(self, rows: RoundedRows | None = None) -> None:
        self._rows = rows
        self.name += kept_as(rows)

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> GatherBatch:
        return GatherBatch(kv, chunks, rule, self._rows)


def kept_as(rows: RoundedRows | None) -> str:
    """For a backend's name."""
    return "" if rows is None else f", KV in {rows.group.rounding}"


class Gathered(NamedTuple):
    """What a layer gathers, by layer. `stale`: token rows of what was gathered that nobody looks at, None: there are
    none. Whoever had the block before may have left there what is no number, and a weight of zero does not undo that.
    """

    rows: torch.Tensor
    stale: torch.Tensor | None


class GatherBatch:
    def __init__(
        self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL, rows: RoundedRows | None = None
    ) -> None:
        _, layers, self._planes, self._kv_heads, self._block_tokens, self._row_items = kv.shape
        self._head_dim = self._row_items if rows is None else rows.group.width
        self._rule = rule
        self._rows = rows
        self._answered = rule.values or self._head_dim
        self._per_block = layers * self._planes * self._kv_heads
        # Where a layer's keys and values begin, in rows of one head of one block: [layers, planes].
        self._offsets = np.arange(layers * self._planes).reshape(layers, self._planes) * self._kv_heads
        self._device = kv.device
        self._block_rows = kv.view(-1, self._block_tokens * self._row_items)
        self._token_rows = kv.view(-1, self._row_items)
        self._heads = np.arange(self._kv_heads)
        self._write_rows = self._rows_to_write(chunks)
        self._num_decodes = decodes_first(chunks)
        if self._num_decodes:
            self._prepare_decodes(chunks[: self._num_decodes])
        self._prefills = [self._prepare_prefill(c) for c in chunks[self._num_decodes :]]

    # Once a step.

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _rows_to_write(self, chunks: list[Chunk]) -> torch.Tensor:
        """Token rows of all new keys and values, [layers, planes * kv_heads * T], head-major like key and value."""
        blocks, slots = [], []
        for chunk in chunks:
            positions = np.arange(chunk.start, chunk.start + chunk.num_tokens)
            blocks.append(np.asarray(chunk.block_ids, dtype=np.int64)[positions // self._block_tokens])
            slots.append(positions % self._block_tokens)
        block, slot = np.concatenate(blocks), np.concatenate(slots)
        rows = (block * self._per_block + self._heads[:, None]) * self._block_tokens + slot
        return self._all_layers(rows, self._block_tokens)

    def _all_layers(self, rows: np.ndarray, scale: int = 1) -> torch.Tensor:
        """Rows of layer 0's keys -> [layers, keys then values, flat]."""
        offsets = self._offsets * scale
        return self._tensor((offsets[:, :, None] + rows.reshape(-1)).reshape(len(offsets), -1))

    def _prepare_decodes(self, decodes: list[Chunk]) -> None:
        """Padded block rows, all layers, and a mask over the padding [batch, 1, 1, tokens]."""
        spans = [self._span(c) for c in decodes]
        num_blocks = max(end - first for first, end in spans)
        table = np.empty((len(decodes), num_blocks), dtype=np.int64)
        for i, (chunk, (first, end)) in enumerate(zip(decodes, spans, strict=True)):
            table[i] = chunk.block_ids[first]
            table[i, : end - first] = chunk.block_ids[first:end]
        rows = table[:, None, :] * self._per_block + self._heads[:, None]
        keys = np.asarray([[first] for first, _ in spans]) * self._block_tokens
        inside = self._seen(keys + np.arange(num_blocks * self._block_tokens), np.asarray([[c.start] for c in decodes]))
        self._decode_rows = Gathered(self._all_layers(rows), self._stale(~inside))
        self._decode_mask = None if inside.all() else self._tensor(inside[:, None, None, :])

    def _stale(self, unseen: np.ndarray) -> torch.Tensor | None:
        """`unseen` [batch, tokens]"""
        own, token = np.nonzero(unseen)
        if not len(own):
            return None
        heads = (np.arange(self._planes)[:, None, None] * len(unseen) + own) * self._kv_heads + self._heads[:, None]
        return self._tensor((heads * unseen.shape[1] + token).reshape(-1))

    def _span(self, chunk: Chunk) -> tuple[int, int]:
        """Blocks of the table that the chunk looks at."""
        end = -(-(chunk.start + chunk.num_tokens) // self._block_tokens)
        return self._rule.first_block(chunk.start, self._block_tokens), end

    def _seen(self, keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """Whether tokens at positions `queries` look at those at positions `keys`."""
        seen = keys <= queries
        if self._rule.window:
            seen &= keys > queries - self._rule.window
        if self._rule.chunk:
            seen &= keys >= queries // self._rule.chunk * self._rule.chunk
        return seen

    def _prepare_prefill(self, chunk: Chunk) -> tuple[Chunk, Gathered | None, torch.Tensor | None]:
        """Nothing to gather when the chunk is the sequence's beginning, unless what is kept is not what came."""
        tokens = chunk.start + chunk.num_tokens
        own = np.arange(chunk.start, tokens)[:, None]
        if chunk.start == 0 and self._rows is None:
            within = self._rule.first(tokens - 1) == 0
            return chunk, None, None if within else self._tensor(self._seen(np.arange(tokens), own))
        first, end = self._span(chunk)
        table = np.asarray(chunk.block_ids[first:end], dtype=np.int64)
        rows = self._all_layers(table * self._per_block + self._heads[:, None])
        keys = np.arange(first * self._block_tokens, end * self._block_tokens)
        return chunk, Gathered(rows, self._stale(keys[None] >= tokens)), self._tensor(self._seen(keys, own))

    # Every layer.

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        extras: Extras = PLAIN,
    ) -> torch.Tensor:
        self._write(layer, key, value)
        _, heads, num_tokens, _ = query.shape
        group = heads // self._kv_heads
        if self._num_decodes == num_tokens:
            return self._decode(layer, query, group, scaling, extras)
        output = query.new_empty(1, num_tokens, heads, self._answered)
        if self._num_decodes:
            rows = slice(0, self._num_decodes)
            output[:, rows] = self._decode(layer, query[:, :, rows], group, scaling, extras)
        for chunk, gathered, mask in self._prefills:
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
            q = query[:, :, rows]
            if gathered is None:
                k = key[:, :, rows]
                v = value[:, :, rows] if self._planes == 2 else k
            else:
                k, v = self._gather(layer, gathered, 1)
            output[:, rows] = attended(q, k, v, mask, scaling, extras)[..., : self._answered].transpose(1, 2)
        return output

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if self._rows is not None:
            new = self._rows.of(key, value)
        else:
            new = torch.cat((key, value)) if self._planes == 2 else key
        self._token_rows.index_copy_(0, self._write_rows[layer], new.reshape(-1, self._row_items))

    def _gather(self, layer: int, gathered: Gathered, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [batch, kv_heads, tokens, head_dim]. Of a latent group values are the whole keys: torch
        has fast attention for one width only, and what it computes too much is left out after.
        """
        found = self._block_rows.index_select(0, gathered.rows[layer])
        if gathered.stale is not None:
            found.view(-1, self._row_items).index_fill_(0, gathered.stale, 0)
        found = found.view(self._planes, batch, self._kv_heads, -1, self._row_items)
        return (found[0], found[-1]) if self._rows is None else self._rows.read(found[0])

    def _decode(self, layer: int, query: torch.Tensor, group: int, scaling: float, extras: Extras) -> torch.Tensor:
        """[1, heads, batch, head_dim] -> [1, batch, heads, head_dim], of a latent group as many as are values.

        The heads that share a key head stand as rows of one small matrix, so keys are not repeated.
        """
        _, heads, batch, head_dim = query.shape
        k, v = self._gather(layer, self._decode_rows, batch)
        if extras is not PLAIN:
            q = query[0].transpose(0, 1)[:, :, None]  # [batch, heads, 1, head_dim]
            mask = self._decode_mask
            if mask is None:
                mask = torch.ones(k.shape[-2], dtype=torch.bool, device=k.device)
            return attended(q, k, v, mask, scaling, extras)[:, :, 0, : self._answered][None]
        q = query[0].transpose(0, 1).reshape(batch, self._kv_heads, group, head_dim)
        answer = sdpa(q, k, v, attn_mask=self._decode_mask, scale=scaling).reshape(1, batch, heads, head_dim)
        return answer[..., : self._answered]


def attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    extras: Extras,
) -> torch.Tensor:
    """query [B, heads, T, d], key, value [B, kv_heads, n, d], mask [..., T, n] -> [B, heads, T, value_dim]; without a
    mask T is n, and attention is causal. With a soft cap or sinks it is written out, with the softmax in float32.
    """
    group = query.shape[1] // key.shape[1]
    if extras is PLAIN:
        causal = mask is None
        return sdpa(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=group > 1)
    if group > 1:
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if extras.softcap:
        scores = extras.softcap * torch.tanh(scores / extras.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if extras.sinks is not None:
        sinks = extras.sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[-2]]
    return weights.to(value.dtype) @ value
