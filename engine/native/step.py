"""A step's packed row as the kernels want it: flat arrays, held for as long as the call lasts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.attention.interface import Chunk
from engine.native.library import CStep
from kv_transfer.layout import FULL, Rounding, Rule

_ROUNDINGS = ("", "int8", "int8_values", "fp8", "fp8_values")  # rounding.h


class NativeStep:
    """`c` points into the arrays of this object; keep it until the kernel has returned."""

    def __init__(self, kv: torch.Tensor, chunks: Sequence[Chunk], rule: Rule = FULL, rounding: Rounding = "") -> None:
        table_at, used = 0, []
        rows = np.empty((len(chunks), 4), dtype=np.int32)
        block_tokens = kv.shape[4]
        for row, chunk in zip(rows, chunks, strict=True):
            first = rule.first_block(chunk.start, block_tokens)
            blocks = -(-(chunk.start + chunk.num_tokens) // block_tokens)
            row[:] = (chunk.first_row, chunk.num_tokens, chunk.start, table_at - first)
            used += chunk.block_ids[first:blocks]
            table_at += blocks - first
        self._chunks = rows
        self._tables = np.asarray(used, dtype=np.int32)
        self._kept: np.ndarray
        self.c = CStep()
        self.c.num_tokens = sum(chunk.num_tokens for chunk in chunks)
        self.c.num_chunks = len(chunks)
        self.c.chunks = rows.ctypes.data
        self.c.tables = self._tables.ctypes.data
        self.c.pool = kv.data_ptr()
        self.c.block_tokens = block_tokens
        self.c.rounding = _ROUNDINGS.index(rounding)

    def ask(
        self, token_ids: Sequence[int], positions: Sequence[int], keep: Sequence[int], vocabulary: int
    ) -> torch.Tensor:
        """Sets what a whole stack needs besides; returns where the logits will be, [len(keep), vocabulary] float32."""
        self._token_ids = np.asarray(token_ids, dtype=np.int64)
        self._positions = np.asarray(positions, dtype=np.int32)
        self._kept = np.asarray(keep, dtype=np.int32)
        logits = torch.empty((len(keep), vocabulary), dtype=torch.float32)
        self.c.token_ids = self._token_ids.ctypes.data
        self.c.positions = self._positions.ctypes.data
        self.c.num_kept = len(keep)
        self.c.kept = self._kept.ctypes.data
        self.c.logits = logits.data_ptr()
        return logits

    def tap(self, given: torch.Tensor) -> torch.Tensor:
        """For a trial: `given` [layers, tokens, hidden] is what each layer gets. Returns where what it would have got
        will be, and what the last one made: [layers + 1, tokens, hidden].
        """
        self._given = given
        made = given.new_empty((len(given) + 1, *given.shape[1:]))
        self.c.given, self.c.made = given.data_ptr(), made.data_ptr()
        return made
