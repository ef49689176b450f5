"""Paged attention whose result for a token depends on that token's sequence alone, to the last bit.

The operators are those of gather.py; what torch's CPU kernel lets the batch and the chunk decide is fixed here:

    keys      padded to whole tiles of KEY_TILE, the split of torch's kernel: each product of weights and values sums
              over one length, wherever the step's chunks end. (In float32 a sum over 320 keys and the same sum padded
              with zeros to 512 differ; in bfloat16 they did not.)
    queries   padded to a multiple of QUERY_ROWS: products of fewer rows go through other code
    mask      always, also for a prompt's first chunk: the causal flag goes through other code
    cache     always read: a chunk's own keys come back from the pool like all others

Measured on CPU, not promised by torch: tests/model/test_batch_invariance.py holds it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from engine.attention.gather import GatherBatch
from engine.attention.interface import PLAIN, Chunk, Extras
from kv_transfer.layout import FULL, Rule

KEY_TILE = 512
QUERY_ROWS = 8


class InvariantBackend:
    name = "torch gather + sdpa, batch-invariant"

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> InvariantBatch:
        return InvariantBatch(kv, chunks)


class InvariantBatch(GatherBatch):
    """Rows of the packed row beyond the chunks are padding: neither written nor attended, zeros in the output."""

    def __init__(self, kv: torch.Tensor, chunks: list[Chunk]) -> None:
        super().__init__(kv, chunks)
        self._num_rows = sum(chunk.num_tokens for chunk in chunks)

    def _padded_blocks(self, num_tokens: int) -> int:
        """Blocks in whole key tiles. Padding reads block 0, which is finite and masked."""
        return -(-num_tokens // KEY_TILE) * (KEY_TILE // self._block_tokens)

    def _prepare_decodes(self, decodes: list[Chunk]) -> None:
        lengths = np.asarray([c.start + 1 for c in decodes])
        num_blocks = self._padded_blocks(int(lengths.max()))
        table = np.zeros((len(decodes), num_blocks), dtype=np.int64)
        for i, chunk in enumerate(decodes):
            used = -(-int(lengths[i]) // self._block_tokens)
            table[i, :used] = chunk.block_ids[:used]
        self._decode_rows = self._all_layers(table[:, None, :] * self._per_block + self._heads[:, None])
        inside = np.arange(num_blocks * self._block_tokens) < lengths[:, None]
        self._decode_mask = self._tensor(inside[:, None, None, :])

    def _prepare_prefill(self, chunk: Chunk) -> tuple[Chunk, torch.Tensor | None, torch.Tensor | None]:
        tokens = chunk.start + chunk.num_tokens
        table = np.zeros(self._padded_blocks(tokens), dtype=np.int64)
        used = -(-tokens // self._block_tokens)
        table[:used] = chunk.block_ids[:used]
        rows = self._all_layers(table * self._per_block + self._heads[:, None])
        own = np.arange(chunk.start, chunk.start + _whole(chunk.num_tokens))[:, None]
        mask = self._tensor(np.arange(len(table) * self._block_tokens) <= np.minimum(own, tokens - 1))
        return chunk, rows, mask

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        extras: Extras = PLAIN,
    ) -> torch.Tensor:
        new = torch.cat((key[:, :, : self._num_rows], value[:, :, : self._num_rows])).reshape(-1, self._head_dim)
        self._token_rows.index_copy_(0, self._write_rows[layer], new)

        _, heads, num_tokens, head_dim = query.shape
        group = heads // self._kv_heads
        output = query.new_zeros(1, num_tokens, heads, head_dim)
        if self._num_decodes:
            rows = slice(0, self._num_decodes)
            output[:, rows] = self._decode(layer, query[:, :, rows], group, scaling, extras)
        for chunk, gather_rows, mask in self._prefills:
            assert gather_rows is not None
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
            k, v = self._gather(gather_rows[layer], 1)
            q = pad(query[:, :, rows], (0, 0, 0, _whole(chunk.num_tokens) - chunk.num_tokens))
            attended = sdpa(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=group > 1)
            output[:, rows] = attended[:, :, : chunk.num_tokens].transpose(1, 2)
        return output

    def _decode(self, layer: int, query: torch.Tensor, group: int, scaling: float, extras: Extras) -> torch.Tensor:
        _, heads, batch, head_dim = query.shape
        q = query[0].transpose(0, 1).reshape(batch, self._kv_heads, group, head_dim)
        q = pad(q, (0, 0, 0, _whole(group) - group))
        k, v = self._gather(self._decode_rows[layer], batch)
        attended = sdpa(q, k, v, attn_mask=self._decode_mask, scale=scaling)
        return attended[:, :, :group].reshape(1, batch, heads, head_dim)


def _whole(rows: int) -> int:
    return -(-rows // QUERY_ROWS) * QUERY_ROWS
