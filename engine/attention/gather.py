"""Paged attention from torch's own operators: gathers a sequence's blocks, then scaled-dot-product attention.

Runs on every device; the backend of CPU. The pool is looked at as rows, so that one gather delivers
[kv_heads, tokens, head_dim] without a second copy:

    row of a block's head   ((block * layers + layer) * 2 + k_or_v) * kv_heads + head          [block_tokens * head_dim]
    row of one token        row of its block's head * block_tokens + slot                      [head_dim]

Indices of all layers are built once a step, keys and values together: a layer costs one gather and one write.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from engine.attention.interface import Chunk


class GatherBackend:
    name = "torch gather + sdpa"

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk]) -> GatherBatch:
        return GatherBatch(kv, chunks)


class GatherBatch:
    def __init__(self, kv: torch.Tensor, chunks: list[Chunk]) -> None:
        _, layers, _, self._kv_heads, self._block_tokens, self._head_dim = kv.shape
        self._per_block = layers * 2 * self._kv_heads
        # Where a layer's keys and values begin, in rows of one head of one block: [layers, 2].
        self._offsets = np.arange(layers * 2).reshape(layers, 2) * self._kv_heads
        self._device = kv.device
        self._block_rows = kv.view(-1, self._block_tokens * self._head_dim)
        self._token_rows = kv.view(-1, self._head_dim)
        self._heads = np.arange(self._kv_heads)
        self._write_rows = self._rows_to_write(chunks)
        decodes = [c for c in chunks if c.num_tokens == 1 and c.start > 0]
        self._num_decodes = len(decodes)
        if decodes:
            self._prepare_decodes(decodes)
        self._prefills = [self._prepare_prefill(c) for c in chunks if not (c.num_tokens == 1 and c.start > 0)]

    # Once a step.

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _rows_to_write(self, chunks: list[Chunk]) -> torch.Tensor:
        """Token rows of all new keys and values, [layers, 2 * kv_heads * T], head-major like key and value."""
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
        lengths = np.asarray([c.start + 1 for c in decodes])
        num_blocks = -(-int(lengths.max()) // self._block_tokens)
        table = np.zeros((len(decodes), num_blocks), dtype=np.int64)
        for i, chunk in enumerate(decodes):
            used = -(-int(lengths[i]) // self._block_tokens)
            table[i, :used] = chunk.block_ids[:used]
        rows = table[:, None, :] * self._per_block + self._heads[:, None]
        self._decode_rows = self._all_layers(rows)
        self._decode_tokens = num_blocks * self._block_tokens
        inside = np.arange(self._decode_tokens) < lengths[:, None]
        self._decode_mask = None if inside.all() else self._tensor(inside[:, None, None, :])

    def _prepare_prefill(self, chunk: Chunk) -> tuple[Chunk, torch.Tensor | None, torch.Tensor | None]:
        """Nothing to gather when the chunk is the sequence's beginning."""
        if chunk.start == 0:
            return chunk, None, None
        tokens = chunk.start + chunk.num_tokens
        used = -(-tokens // self._block_tokens)
        table = np.asarray(chunk.block_ids[:used], dtype=np.int64)
        rows = self._all_layers(table * self._per_block + self._heads[:, None])
        own = np.arange(chunk.start, tokens)[:, None]
        mask = self._tensor(np.arange(used * self._block_tokens) <= own)
        return chunk, rows, mask

    # Every layer.

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        new = torch.cat((key, value)).reshape(-1, self._head_dim)
        self._token_rows.index_copy_(0, self._write_rows[layer], new)

        _, heads, num_tokens, head_dim = query.shape
        group = heads // self._kv_heads
        if self._num_decodes == num_tokens:
            return self._decode(layer, query, group, scaling)
        output = query.new_empty(1, num_tokens, heads, head_dim)
        if self._num_decodes:
            rows = slice(0, self._num_decodes)
            output[:, rows] = self._decode(layer, query[:, :, rows], group, scaling)
        for chunk, gather_rows, mask in self._prefills:
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
            q = query[:, :, rows]
            if gather_rows is None:
                attended = sdpa(
                    q, key[:, :, rows], value[:, :, rows], is_causal=True, scale=scaling, enable_gqa=group > 1
                )
            else:
                k, v = self._gather(gather_rows[layer], 1)
                attended = sdpa(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=group > 1)
            output[:, rows] = attended.transpose(1, 2)
        return output

    def _gather(self, rows: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [batch, kv_heads, tokens, head_dim], contiguous."""
        found = self._block_rows.index_select(0, rows).view(2, batch, self._kv_heads, -1, self._head_dim)
        return found[0], found[1]

    def _decode(self, layer: int, query: torch.Tensor, group: int, scaling: float) -> torch.Tensor:
        """[1, heads, batch, head_dim] -> [1, batch, heads, head_dim].

        The heads that share a key head stand as rows of one small matrix, so keys are not repeated.
        """
        _, heads, batch, head_dim = query.shape
        q = query[0].transpose(0, 1).reshape(batch, self._kv_heads, group, head_dim)
        k, v = self._gather(self._decode_rows[layer], batch)
        attended = sdpa(q, k, v, attn_mask=self._decode_mask, scale=scaling)
        return attended.reshape(1, batch, heads, head_dim)
