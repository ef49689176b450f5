"""One forward pass over a step's packed row, by transformers' own code with our attention in it.

engine/native/stack.py computes the same in one call where the model's shape is known.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.attention.grouped import GroupedBackend
from engine.attention.interface import AttentionBackend, Chunk, StepBatch, attending
from engine.kv_shape import KvPool, parts
from engine.layer_taps import Tapped, tapped
from engine.recurrent import recurrence_of


@dataclass(frozen=True, slots=True)
class Arriving:
    """Tokens that the step before sampled and the host has not seen: row `rows[i]` of the packed row is
    `tokens[sources[i]]`. `tokens` [n] int64 lies on the device.
    """

    rows: Sequence[int]
    sources: Sequence[int]
    tokens: torch.Tensor


class Forward(Protocol):
    @property
    def name(self) -> str:
        """For `diptych status`."""
        ...

    def forward(
        self,
        kv: KvPool,
        token_ids: Sequence[int],
        positions: Sequence[int],
        chunks: list[Chunk],
        keep: Sequence[int],
        arriving: Arriving | None = None,
    ) -> torch.Tensor:
        """Writes the tokens' KV into the pool; returns logits [len(keep), vocabulary] of the packed rows `keep`.

        `token_ids` has anything where tokens arrive. They do on CUDA only: elsewhere the host knows them.
        """
        ...


class TorchForward:
    """`row_multiple`: the packed row is padded to whole multiples of it. `layers`: what they run on, for `name`."""

    def __init__(
        self, model: Any, backend: AttentionBackend | GroupedBackend, row_multiple: int = 1, layers: str = ""
    ) -> None:
        self.model = model
        self.backend = backend
        self._row_multiple = row_multiple
        self._layers = layers
        self._recurrence = recurrence_of(model)
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def name(self) -> str:
        return self.backend.name + (f", {self._layers}" if self._layers else "")

    def forward(
        self,
        kv: KvPool,
        token_ids: Sequence[int],
        positions: Sequence[int],
        chunks: list[Chunk],
        keep: Sequence[int],
        arriving: Arriving | None = None,
    ) -> torch.Tensor:
        batch: StepBatch = self.backend.prepare(kv, chunks)  # type: ignore[arg-type]  # one takes what the other does not
        # Padding is token 0 at position 0; no chunk covers it, so attention leaves it out and nobody reads its logits.
        padding = [0] * (-len(token_ids) % self._row_multiple)
        rows = len(token_ids) + len(padding)
        filled = () if arriving is None else (*arriving.rows, *arriving.sources)
        staged = torch.tensor([*token_ids, *padding, *positions, *padding, *keep, *filled])
        device = parts(kv)[0].device
        if device.type == "cuda":
            staged = staged.pin_memory().to(device, non_blocking=True)  # one copy, and no wait for it
        tokens, places, kept, *to = staged.split([rows, rows, len(keep), *([len(filled) // 2] * 2 if filled else [])])
        if arriving is not None:
            tokens[to[0]] = arriving.tokens[to[1]]
        if self._recurrence is None:
            return self.logits(tokens[None], places[None], batch, kept)
        with self._recurrence.during(parts(kv), chunks):
            return self.logits(tokens[None], places[None], batch, kept)

    def tapped(self, replaced: Mapping[int, torch.Tensor]) -> AbstractContextManager[Tapped]:
        """For a trial: each layer is given its part of `replaced`, and what it makes of it is noted."""
        own: Any = getattr(self.model, "tapped", None)
        return tapped(self.model, replaced) if own is None else own(replaced)

    def logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, batch: StepBatch, keep: torch.Tensor
    ) -> torch.Tensor:
        """token_ids, positions [1, T]; keep [n] -> [n, vocabulary]. All on the device; nothing here waits for it."""
        extra: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_rows else {}
        with attending(batch):
            logits = self.model(input_ids=token_ids, position_ids=positions, use_cache=False, **extra).logits[0]
        return logits if self._keeps_rows else logits[keep]
