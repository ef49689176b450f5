"""Paged attention whose result for a token depends on that token's sequence alone, to the last bit.

The operators are those of gather.py; what torch's CPU kernel lets the batch and the chunk decide is fixed here:

    keys      padded to whole tiles of KEY_TILE, the split of torch's kernel: each product of weights and values sums
              over one length, wherever the step's chunks end. (In float32 a sum over 320 keys and the same sum padded
              with zeros to 512 differ; in bfloat16 they did not.)
    queries   padded to a multiple of QUERY_ROWS: products of fewer rows go through other code
    mask      always, also for a prompt's first chunk: the causal flag goes through other code
    cache     always read: a chunk's own keys come back from the pool like all others
    windows   a token's keys begin with the tile that its window or chunk begins in: a step's tokens are computed in
              pieces that begin in one tile
    extras    torch has no kernel for soft caps and sinks. `_written_out` has every product in one size.

Measured on CPU, not promised by torch: tests/model/test_batch_invariance.py holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from engine.attention.gather import GatherBatch, Gathered, kept_as
from engine.attention.interface import PLAIN, Chunk, Extras
from engine.kv_rounding import RoundedRows
from kv_transfer.layout import FULL, Rule

KEY_TILE = 512
QUERY_ROWS = 8


class InvariantBackend:
    """`rows`: of a rounded group."""

    name = "torch gather + sdpa, batch-invariant"

    def __init__(self, rows: RoundedRows | None = None) -> None:
        self._rows = rows
        self.name += kept_as(rows)

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> InvariantBatch:
        return InvariantBatch(kv, chunks, rule, self._rows)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of the packed row whose keys begin in one tile."""

    first_row: int
    num_rows: int
    keys: Gathered
    mask: torch.Tensor


class InvariantBatch(GatherBatch):
    """Rows of the packed row beyond the chunks are padding: neither written nor attended, zeros in the output."""

    def __init__(
        self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL, rows: RoundedRows | None = None
    ) -> None:
        super().__init__(kv, chunks, rule, rows)
        self._num_rows = sum(chunk.num_tokens for chunk in chunks)
        self._pieces = [piece for chunk, _, _ in self._prefills for piece in self._pieces_of(chunk)]

    def _table(self, chunk: Chunk, first: int, end: int) -> tuple[np.ndarray, int]:
        """Blocks in whole key tiles around tokens first .. end, and the token that they begin with.

        What nobody looks at reads a block of the sequence itself, and is zeroed and masked.
        """
        begin = first // KEY_TILE * KEY_TILE
        table = np.full(-(-(end - begin) // KEY_TILE) * (KEY_TILE // self._block_tokens), -1, dtype=np.int64)
        low, high = first // self._block_tokens, -(-end // self._block_tokens)
        skipped = low - begin // self._block_tokens
        table[skipped : skipped + high - low] = chunk.block_ids[low:high]
        table[table < 0] = chunk.block_ids[low]
        return table, begin

    def _prepare_decodes(self, decodes: list[Chunk]) -> None:
        tables = [self._table(c, self._rule.first(c.start), c.start + 1) for c in decodes]
        num_blocks = max(len(table) for table, _ in tables)
        table = np.stack([_lengthened(own, num_blocks) for own, _ in tables])
        keys = np.asarray([[begin] for _, begin in tables]) + np.arange(num_blocks * self._block_tokens)
        inside = self._seen(keys, np.asarray([[c.start] for c in decodes]))
        rows = self._all_layers(table[:, None, :] * self._per_block + self._heads[:, None])
        self._decode_rows = Gathered(rows, self._stale(~inside))
        self._seen_by_decodes = self._tensor(inside[:, None, None, :])

    def _prepare_prefill(self, chunk: Chunk) -> tuple[Chunk, Gathered | None, torch.Tensor | None]:
        return chunk, None, None  # in pieces, see there

    def _pieces_of(self, chunk: Chunk) -> list[_Piece]:
        pieces: list[_Piece] = []
        positions = np.arange(chunk.start, chunk.start + chunk.num_tokens)
        tiles = np.asarray([self._rule.first(p) // KEY_TILE for p in positions.tolist()])
        for own in np.split(positions, np.flatnonzero(np.diff(tiles)) + 1):
            start, tokens = int(own[0]), int(own[-1]) + 1
            table, begin = self._table(chunk, self._rule.first(start), tokens)
            rows = self._all_layers(table * self._per_block + self._heads[:, None])
            queries = np.minimum(start + np.arange(_whole(len(own))), tokens - 1)[:, None]
            mask = self._seen(begin + np.arange(len(table) * self._block_tokens), queries)
            unseen = np.logical_not(np.any(mask, axis=0, keepdims=True))
            keys = Gathered(rows, self._stale(np.asarray(unseen)))
            pieces.append(_Piece(chunk.first_row + start - chunk.start, len(own), keys, self._tensor(mask[None, None])))
        return pieces

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        extras: Extras = PLAIN,
    ) -> torch.Tensor:
        self._write(layer, *(t[:, :, : self._num_rows] for t in (key, value)))
        _, heads, num_tokens, _ = query.shape
        group = heads // self._kv_heads
        output = query.new_zeros(1, num_tokens, heads, self._rule.values or self._head_dim)
        if self._num_decodes:
            rows = slice(0, self._num_decodes)
            output[:, rows] = self._decode(layer, query[:, :, rows], group, scaling, extras)
        for piece in self._pieces:
            rows = slice(piece.first_row, piece.first_row + piece.num_rows)
            k, v = self._gather(layer, piece.keys, 1)
            q = pad(query[:, :, rows], (0, 0, 0, _whole(piece.num_rows) - piece.num_rows))
            if extras is PLAIN:
                answer = sdpa(q, k, v, attn_mask=piece.mask, scale=scaling, enable_gqa=group > 1)
            else:
                answer = _written_out(q, k, v, piece.mask, scaling, extras)
            output[:, rows] = answer[:, :, : piece.num_rows, : output.shape[-1]].transpose(1, 2)
        return output

    def _decode(self, layer: int, query: torch.Tensor, group: int, scaling: float, extras: Extras) -> torch.Tensor:
        _, heads, batch, head_dim = query.shape
        k, v = self._gather(layer, self._decode_rows, batch)
        values = self._rule.values or head_dim
        if extras is not PLAIN:
            q = query[0].transpose(0, 1)[:, :, None]
            return _written_out(q, k, v, self._seen_by_decodes, scaling, extras)[:, :, 0, :values][None]
        q = query[0].transpose(0, 1).reshape(batch, self._kv_heads, group, head_dim)
        q = pad(q, (0, 0, 0, _whole(group) - group))
        answer = sdpa(q, k, v, attn_mask=self._seen_by_decodes, scale=scaling)
        return answer[:, :, :group, :values].reshape(1, batch, heads, values)


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    extras: Extras,
) -> torch.Tensor:
    """query [B, heads, T, d], key, value [B, kv_heads, n, d], mask [B, 1, T, n] -> [B, heads, T, d]; n in whole tiles.

    Every product is [kv_heads, group * QUERY_ROWS, d] by one tile of keys, every sum over one tile; tiles are added in
    order. So nothing of a row depends on how many others there are.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    query = pad(query, (0, 0, 0, _whole(tokens) - tokens))
    mask = torch.cat((mask, mask[:, :, -1:].expand(-1, -1, _whole(tokens) - tokens, -1)), dim=2)
    sinks = None if extras.sinks is None else extras.sinks.float().view(kv_heads, group, 1)
    answer = torch.empty_like(query)
    for b in range(batch):
        for first in range(0, tokens, QUERY_ROWS):
            rows = slice(first, first + QUERY_ROWS)
            q = query[b, :, rows].reshape(kv_heads, group * QUERY_ROWS, dim)
            seen = mask[b, :, rows].repeat(1, group, 1)
            scores: list[torch.Tensor] = []
            for k, here in zip(key[b].split(KEY_TILE, 1), seen.split(KEY_TILE, 2), strict=True):
                score = (q @ k.transpose(1, 2)).float() * scaling
                if extras.softcap:
                    score = extras.softcap * torch.tanh(score / extras.softcap)
                scores.append(score.masked_fill(~here, float("-inf")))
            most = torch.stack([s.amax(-1) for s in scores]).amax(0)
            spread = None if sinks is None else sinks.expand(-1, -1, QUERY_ROWS).reshape(kv_heads, -1)
            if spread is not None:
                most = torch.maximum(most, spread)
            total = torch.zeros_like(most) if spread is None else torch.exp(spread - most)
            sum_of = torch.zeros(kv_heads, group * QUERY_ROWS, dim, device=query.device)
            for score, v in zip(scores, value[b].split(KEY_TILE, 1), strict=True):
                weight = torch.exp(score - most[:, :, None])
                total = total + weight.sum(-1)
                sum_of = sum_of + (weight.to(v.dtype) @ v).float()
            answer[b, :, rows] = (sum_of / total[:, :, None]).to(query.dtype).view(heads, QUERY_ROWS, dim)
    return answer[:, :, :tokens]


def _lengthened(table: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate((table, np.full(size - len(table), table[0])))


def _whole(rows: int) -> int:
    return -(-rows // QUERY_ROWS) * QUERY_ROWS
