"""Paged attention by our own CPU kernels, for models whose other parts run in torch. Reads the pool where it lies."""

from __future__ import annotations

import torch

from engine.attention.gather import kept_as
from engine.attention.interface import PLAIN, Chunk, Extras
from engine.kv_rounding import RoundedRows
from engine.native.library import CLook, Library
from engine.native.step import NativeStep
from kv_transfer.layout import FULL, Rounding, Rule


class NativeBackend:
    """Of float32 and bfloat16. A row's result depends on its own sequence alone, to the last bit. `rows`: of a rounded
    group.
    """

    def __init__(self, library: Library, rows: RoundedRows | None = None) -> None:
        self._library = library
        self._rounding: Rounding = "" if rows is None else rows.group.rounding
        self.name = f"native paged ({library.isa}){kept_as(rows)}"

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> NativeBatch:
        return NativeBatch(self._library, kv, chunks, rule, self._rounding)


class NativeBatch:
    def __init__(self, library: Library, kv: torch.Tensor, chunks: list[Chunk], rule: Rule, rounding: Rounding) -> None:
        self._library = library
        self._layers = kv.shape[1]
        self._rule = rule
        self._step = NativeStep(kv, chunks, rule, rounding)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        extras: Extras = PLAIN,
    ) -> torch.Tensor:
        rule = self._rule
        q, k = (t[0].transpose(0, 1).contiguous() for t in (query, key))
        v = k if rule.values else value[0].transpose(0, 1).contiguous()
        out = q.new_empty(q.shape[0], q.shape[1], rule.values or q.shape[2])
        sinks = None if extras.sinks is None else extras.sinks.float().contiguous()
        look = CLook(rule.window, rule.chunk, scaling, extras.softcap, None if sinks is None else sinks.data_ptr())
        self._library.attention(self._step.c, look, rule.values, self._layers, layer, q, k, v, out)
        return out[None]
