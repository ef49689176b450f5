"""Keys and values that nobody computed: what an excerpt of the trial at start has before it (engine/position_trial.py).

A layer's are those of a few real tokens at the beginning, again and again. (Random ones make a trained model compute
what no input would, and rounding then changes it beyond recognition.) So thousands of them take a few blocks, which
block tables name again and again. Where an attention's view ends some are loud, and so is what a wrong view changes.

The reference gets them in its cache, layer by layer (`before`); our pools get the same, to the bit (`Placed`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.kv_rounding import RoundedRows
from engine.kv_shape import KvPool, KvShape, parts
from engine.model_probe import LayerSeen
from kv_transfer.layout import GONE, Rounding

_PERIOD = 64  # tokens after which they repeat
SLOTS = 2  # of an excerpt in a state group


@dataclass(frozen=True, slots=True)
class Loud:
    """Tokens [start, end), counted as the held ones are, whose keys and values are so many times larger. `greeted`:
    their keys are that of the first token, which trained models look at before all others.
    """

    start: int
    end: int
    keys: float = 1.0
    values: float = 1.0
    greeted: bool = False


@dataclass(frozen=True, slots=True)
class _Base:
    """keys [kv_heads, tokens, width] and values [kv_heads, tokens, value width], as they came."""

    keys: torch.Tensor
    values: torch.Tensor


class MadeUp:
    """`see` each layer's own keys and values first; then `of` says what is made up for it."""

    def __init__(self, layers: Sequence[LayerSeen], rounding: Rounding = "") -> None:
        self._layers = layers
        self.rounding: Rounding = rounding
        self._bases: dict[int, _Base] = {}

    def see(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Of a real beginning, each [1, kv_heads, tokens, width]."""
        self._bases[layer] = _Base(key[0, :, :_PERIOD], value[0, :, :_PERIOD])

    @property
    def period(self) -> int:
        return next((base.keys.shape[1] for base in self._bases.values()), _PERIOD)

    def fits(self) -> bool:
        """Whether the cache of transformers holds what ours does, layer by layer. Layers that it does not hold are
        given what the last one before them had that is alike: they share it.
        """
        source: dict[Any, int] = {}
        for seen in self._layers:
            if seen.rule.state:
                continue
            if seen.layer not in self._bases:
                if seen.kept not in source:
                    return False
                self._bases[seen.layer] = self._bases[source[seen.kept]]
                continue
            source[seen.kept] = seen.layer
            keys, values = self._bases[seen.layer].keys, self._bases[seen.layer].values
            if len(keys) == len(values) == 1 < seen.kv_heads:
                continue  # what all heads share, and the rotary part of keys: that is what our pool keeps too
            if keys.shape[::2] != (seen.kv_heads, seen.width) or len(values) != seen.kv_heads:
                return False
        return bool(source)

    def of(self, layer: int, tokens: torch.Tensor, loud: Sequence[Loud]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of these tokens, each [kv_heads, len(tokens), width]."""
        base = self._bases[layer]
        tokens = tokens.to(base.keys.device)
        place = tokens % base.keys.shape[1]
        keys, values = base.keys[:, place], base.values[:, place]
        for where in loud:
            inside = (tokens >= where.start) & (tokens < where.end)
            if where.greeted:
                keys[:, inside] = base.keys[:, :1]
            keys[:, inside] *= where.keys
            values[:, inside] *= where.values
        return keys, values

    def before(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, held: int, loud: Sequence[Loud]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's new keys and values behind `held` tokens that are made up."""
        if not held:
            return key, value
        keys, values = (made[None].to(key) for made in self.of(layer, torch.arange(held), loud))
        return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)


@dataclass(frozen=True, slots=True)
class Past:
    """What an excerpt has before its own `num_tokens` tokens."""

    held: int
    num_tokens: int
    loud: tuple[Loud, ...] = ()


class Placed:
    """Pools for some excerpts, each behind its past: made up by `made`, in blocks that they share where they can."""

    def __init__(self, made: MadeUp, shape: KvShape, pasts: Sequence[Past], device: torch.device) -> None:
        size = shape.block_tokens
        self._shape = shape
        repeats = math.lcm(made.period, size) // size
        shared = min(repeats, max(-(-past.held // size) for past in pasts))
        fills: list[tuple[int, int, tuple[Loud, ...]]] = [(i, i, ()) for i in range(shared)]  # block, its place, loud
        self._tables: list[list[int]] = []
        used = shared
        for past in pasts:
            table: list[int] = []
            for place in range(-(-(past.held + past.num_tokens) // size)):
                start, end = place * size, (place + 1) * size
                if end <= past.held and not any(w.start < end and w.end > start for w in past.loud):
                    table.append(place % shared)
                    continue
                table.append(used)
                if start < past.held:
                    fills.append((used, place, past.loud))
                used += 1
            self._tables.append(table)
        slots = SLOTS * len(pasts)
        self.pool: KvPool = shape.pool([slots if g.rule.state else used for g in shape.groups], device)
        if fills:
            self._fill(made, fills)

    def _fill(self, made: MadeUp, fills: Sequence[tuple[int, int, tuple[Loud, ...]]]) -> None:
        """What stands in a block after the held tokens is written before it is read."""
        size = self._shape.block_tokens
        for group, pool in zip(self._shape.groups, parts(self.pool), strict=True):
            if group.rule.state:
                continue
            for index, layer in enumerate(group.layers):
                for block, place, loud in fills:
                    tokens = torch.arange(place * size, (place + 1) * size)
                    keys, values = made.of(layer, tokens, loud)
                    if group.rounding:
                        pool[block, index, 0] = RoundedRows(group).of(keys, values).to(pool.device)
                        continue
                    if group.rule.values:
                        keys = torch.cat((keys, values), dim=-1)
                        pool[block, index, 0] = keys.to(pool.device)
                        continue
                    pool[block, index, 0] = keys.to(pool.device)
                    pool[block, index, 1, ..., : values.shape[-1]] = values.to(pool.device)

    def tables(self, excerpt: int, start: int) -> tuple[list[int], ...]:
        """By group, for tokens from `start` on: GONE for blocks that they do not look at."""
        found = []
        for group in self._shape.groups:
            left = 0 if group.rule.state else group.rule.first_block(start, self._shape.block_tokens)
            table = self._tables[excerpt]
            found.append([] if group.rule.state else [GONE] * min(left, len(table)) + table[left:])
        return tuple(found)
