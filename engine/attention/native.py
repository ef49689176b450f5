"""Paged attention by our own CPU kernels, for models whose other parts run in torch. Reads the pool where it lies."""

from __future__ import annotations

import torch

from engine.attention.interface import PLAIN, Chunk, Extras
from engine.native.library import Library
from engine.native.step import NativeStep
from kv_transfer.layout import FULL, Rule


class NativeBackend:
    """Of float32 and bfloat16. A row's result depends on its own sequence alone, to the last bit."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self.name = f"native paged ({library.isa})"

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> NativeBatch:
        return NativeBatch(self._library, kv, chunks)


class NativeBatch:
    def __init__(self, library: Library, kv: torch.Tensor, chunks: list[Chunk]) -> None:
        self._library = library
        self._layers = kv.shape[1]
        self._step = NativeStep(kv, chunks)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        extras: Extras = PLAIN,
    ) -> torch.Tensor:
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        out = torch.empty_like(q)
        self._library.attention(self._step.c, self._layers, layer, scaling, q, k, v, out)
        return out[None]
