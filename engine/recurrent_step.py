"""How the packed row of a step falls into pieces for a recurrent layer, and which of them run as one batch.

A piece is tokens of one sequence that begin with what one slot holds, or with nothing, and whose end goes to others. A
chunk is one piece, cut where its snapshot is taken: the second part begins with the snapshot, after the first has run.
Pieces of one length, that all begin with a state or all with none, run together: the decodes of a step, and prompts of
equal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from engine.attention.interface import Chunk

Rows = slice | torch.Tensor  # of the packed row


@dataclass(frozen=True, slots=True)
class Together:
    """`count` pieces of `tokens` each, one after the other at `rows`. `sources`: slots, None: they begin with nothing.
    `snapshots`: which of them leave their end in a second slot, and in which.
    """

    rows: Rows
    count: int
    tokens: int
    sources: torch.Tensor | None
    targets: torch.Tensor
    snapshots: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class _Piece:
    first: int
    tokens: int
    source: int
    target: int
    snapshot: int = -1


class Step:
    """`slots`: the pool, by the type that it is looked at as."""

    def __init__(self, pool: torch.Tensor, chunks: Sequence[Chunk], dtypes: set[torch.dtype]) -> None:
        self.pool = pool
        self.slots = {dtype: pool.view(dtype) for dtype in dtypes}
        self._chunks = chunks

    @cached_property
    def runs(self) -> np.ndarray:
        """Of each chunk [chunks, 6] int32: first row, tokens, source, target, snapshot after so many, and where."""
        runs = np.empty((len(self._chunks), 6), dtype=np.int32)
        for row, chunk in zip(runs, self._chunks, strict=True):
            use = chunk.state
            assert use is not None, "a chunk without slots for its state"
            snapshot = use.snapshot if use.snapshot_after else -1
            row[:] = (chunk.first_row, chunk.num_tokens, use.source, use.target, use.snapshot_after, snapshot)
        return runs

    @cached_property
    def together(self) -> list[Together]:
        """In the order in which they must run."""
        whole, later = [], []
        for first, tokens, source, target, after, snapshot in self.runs.tolist():
            if 0 < after < tokens:
                whole.append(_Piece(first, after, source, snapshot))
                later.append(_Piece(first + after, tokens - after, snapshot, target))
            else:
                whole.append(_Piece(first, tokens, source, target, snapshot))
        return [self._join(alike) for pieces in (whole, later) for alike in _alike(pieces)]

    def _join(self, pieces: list[_Piece]) -> Together:
        count, tokens = len(pieces), pieces[0].tokens
        first = pieces[0].first
        rows = [row for piece in pieces for row in range(piece.first, piece.first + tokens)]
        in_order = rows == list(range(first, first + len(rows)))
        taken = [(i, piece.snapshot) for i, piece in enumerate(pieces) if piece.snapshot >= 0]
        numbers = torch.tensor(
            [
                *(piece.source for piece in pieces),
                *(piece.target for piece in pieces),
                *(i for i, _ in taken),
                *(slot for _, slot in taken),
                *([] if in_order else rows),
            ]
        )
        numbers = numbers.to(self.pool.device, non_blocking=True)
        sources, targets, which, where, scattered = numbers.split(
            [count, count, len(taken), len(taken), 0 if in_order else len(rows)]
        )
        return Together(
            slice(first, first + len(rows)) if in_order else scattered,
            count,
            tokens,
            sources if pieces[0].source >= 0 else None,
            targets,
            (which, where) if taken else None,
        )


def _alike(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    found: dict[tuple[int, bool], list[_Piece]] = {}
    for piece in pieces:
        found.setdefault((piece.tokens, piece.source >= 0), []).append(piece)
    return list(found.values())
