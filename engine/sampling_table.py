"""What the sampler needs to know of each sequence, as arrays: written once per sequence, gathered by row.

    first step of a sequence   its parameters take a slot; a penalised history is counted whole
    every later step           one look-up per row, then arrays; a penalised row counts the one token that came
    a sequence that is gone    its slot is taken back when slots run out

Sequences are known by the identity of their history and parameters, both of which the table keeps alive. A history
may grow at its end between steps, and change in no other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.token_mask import TokenMask
from engine.types import PlanItem, SamplingParams

_COLUMNS = np.dtype(
    [
        ("temperature", "f8"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("top_k", "i8"),  # 0: all
        ("repetition", "f4"),
        ("presence", "f4"),
        ("frequency", "f4"),
        ("min_tokens", "i8"),  # 0 where no stop token waits for it
        ("logprobs", "i8"),  # -1: not asked
        ("seed", "u8"),
        ("penalised", "?"),
        ("biased", "?"),
        ("masked", "?"),  # some tokens are allowed alone, or banned
        ("structured", "?"),
        ("held_back", "?"),  # structured, and some ends of the answer have to wait
        ("plain", "?"),  # the argmax of the raw logits is all it needs
    ]
)


@dataclass(frozen=True, slots=True)
class Rows:
    """One step. `columns` [rows] has the fields of _COLUMNS; `numbers` [rows] in [0, 1) are the draws' chances."""

    slots: np.ndarray
    positions: np.ndarray
    columns: np.ndarray

    def take(self, at: np.ndarray) -> Rows:
        return Rows(self.slots[at], self.positions[at], self.columns[at])

    @property
    def numbers(self) -> np.ndarray:
        return uniforms(self.columns["seed"], self.positions)


@dataclass(frozen=True, slots=True)
class _Known:
    history: Sequence[int]
    sampling: SamplingParams
    slot: int


class SamplingTable:
    """`vocabulary`: stop tokens outside it can never be sampled, and are left out."""

    def __init__(self, vocabulary: int, slots: int = 64) -> None:
        self._vocabulary = vocabulary
        self._known: dict[tuple[int, int], _Known] = {}
        self._free = list(range(slots))[::-1]
        self._columns = np.zeros(slots, dtype=_COLUMNS)
        self._stops = np.full((slots, 1), -1, dtype=np.int64)  # padded with -1
        self._bias_ids = np.full((slots, 1), -1, dtype=np.int64)  # likewise
        self._biases = np.zeros((slots, 1), dtype=np.float32)
        self._counts = _Counts(slots)
        self._masked: dict[int, TokenMask] = {}  # of slots that have one

    def __len__(self) -> int:
        return len(self._known)

    def look_up(self, items: Sequence[PlanItem]) -> Rows:
        known = self._known
        slots = np.empty(len(items), dtype=np.int64)
        for i, item in enumerate(items):
            found = known.get((id(item.history), id(item.sampling)))
            slots[i] = found.slot if found is not None else self._add(item, items)
        positions = np.fromiter((item.position for item in items), dtype=np.int64, count=len(items))
        return Rows(slots, positions, self._columns[slots])

    def stops(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """(row, token) pairs that may not be sampled yet: stop tokens of rows below their minimum length."""
        short = np.flatnonzero(rows.positions < rows.columns["min_tokens"])
        if not len(short):
            return short, short
        stops = self._stops[rows.slots[short]]
        at, column = np.nonzero(stops >= 0)
        return short[at], stops[at, column]

    def biases(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, token, bias); each (row, token) comes once."""
        biased = np.flatnonzero(rows.columns["biased"])
        slots = rows.slots[biased]
        at, column = np.nonzero(self._bias_ids[slots] >= 0)
        return biased[at], self._bias_ids[slots[at], column], self._biases[slots[at], column]

    def masks(self, rows: Rows) -> list[tuple[int, TokenMask]]:
        """(row, mask) of the rows that have one."""
        return [(row, self._masked[int(rows.slots[row])]) for row in np.flatnonzero(rows.columns["masked"]).tolist()]

    def counts(self, rows: Rows, items: Sequence[PlanItem]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, token, count) of what penalties look at: count is of the answer, 0 for a token of the prompt alone.

        Each (row, token) comes once.
        """
        penalised = np.flatnonzero(rows.columns["penalised"])
        slots = rows.slots[penalised]
        lengths = np.fromiter((len(items[i].history) for i in penalised.tolist()), dtype=np.int64, count=len(penalised))
        grown = np.flatnonzero(lengths != self._counts.length[slots])
        if len(grown):
            _, first = np.unique(slots[grown], return_index=True)
            grown = grown[first]
            by_one = lengths[grown] == self._counts.length[slots[grown]] + 1
            one, many = grown[by_one], grown[~by_one]
            last = np.fromiter((items[i].history[-1] for i in penalised[one].tolist()), dtype=np.int64, count=len(one))
            self._counts.append(slots[one], last)
            for at in many.tolist():  # it came back with tokens from elsewhere
                self._count(int(slots[at]), items[int(penalised[at])])
        row, ids, counts = self._counts.flat(slots)
        return penalised[row], ids, counts

    def _add(self, item: PlanItem, items: Sequence[PlanItem]) -> int:
        if not self._free:
            self._make_room(items)
        slot = self._free.pop()
        p = item.sampling
        structured = item.matcher is not None  # its mask holds the ends back: something must remain allowed
        stops = [t for t in sorted(p.stop_token_ids) if 0 <= t < self._vocabulary]
        if p.min_tokens <= 0 or structured:
            stops = []
        held_back = item.matcher is not None and (
            p.min_tokens > 0 or not p.stop_token_ids.issuperset(item.matcher.end_tokens)
        )
        min_tokens = p.min_tokens if stops else 0
        self._masked.pop(slot, None)
        if p.allowed_token_ids or p.bad_words:
            self._masked[slot] = TokenMask(p.allowed_token_ids, p.bad_words)
        self._columns[slot] = (
            p.temperature,
            p.top_p,
            p.min_p,
            p.top_k,
            p.repetition_penalty,
            p.presence_penalty,
            p.frequency_penalty,
            min_tokens,
            -1 if p.logprobs is None else p.logprobs,
            p.seed & _MASK,
            p.penalised,
            bool(p.logit_bias),
            slot in self._masked,
            structured,
            held_back,
            not (
                structured
                or p.logit_bias
                or slot in self._masked
                or p.temperature > 0
                or p.penalised
                or min_tokens
                or p.logprobs is not None
            ),
        )
        if len(stops) > self._stops.shape[1]:
            self._stops = _widened(self._stops, len(stops), -1)
        self._stops[slot] = -1
        self._stops[slot, : len(stops)] = stops
        self._bias_ids[slot] = -1
        if p.logit_bias:
            if len(p.logit_bias) > self._bias_ids.shape[1]:
                self._bias_ids = _widened(self._bias_ids, len(p.logit_bias), -1)
                self._biases = _widened(self._biases, len(p.logit_bias), 0)
            self._bias_ids[slot, : len(p.logit_bias)] = [token for token, _ in p.logit_bias]
            self._biases[slot, : len(p.logit_bias)] = [bias for _, bias in p.logit_bias]
        self._counts.length[slot] = -1
        if p.penalised:
            self._count(slot, item)
        self._known[id(item.history), id(p)] = _Known(item.history, p, slot)
        return slot

    def _count(self, slot: int, item: PlanItem) -> None:
        history = np.asarray(item.history, dtype=np.int64)
        answer = history[item.prompt_len :]
        prompt = history[: item.prompt_len] if item.sampling.repetition_penalty != 1 else history[:0]
        ids = np.unique(np.concatenate((prompt, answer)))
        answered, times = np.unique(answer, return_counts=True)
        counts = np.zeros(len(ids), dtype=np.int64)
        counts[np.searchsorted(ids, answered)] = times
        self._counts.put(slot, ids, counts, len(history))

    def _make_room(self, items: Sequence[PlanItem]) -> None:
        """Forgets sequences that are not in this step; if all are, doubles the table."""
        present = {(id(item.history), id(item.sampling)) for item in items}
        for key in [key for key in self._known if key not in present]:
            slot = self._known.pop(key).slot
            self._masked.pop(slot, None)
            self._free.append(slot)
        slots = len(self._columns)
        if len(self._free) < slots // 4:
            self._free += range(slots, 2 * slots)
            self._columns = np.concatenate((self._columns, np.zeros(slots, dtype=_COLUMNS)))
            self._stops = np.concatenate((self._stops, np.full_like(self._stops, -1)))
            self._bias_ids = np.concatenate((self._bias_ids, np.full_like(self._bias_ids, -1)))
            self._biases = np.concatenate((self._biases, np.zeros_like(self._biases)))
            self._counts.double()


class _Counts:
    """Distinct tokens of each slot's history: ids and counts [slots, room], of which the first `used` count."""

    def __init__(self, slots: int) -> None:
        self.length = np.full(slots, -1, dtype=np.int64)  # of the history that is counted
        self._used = np.zeros(slots, dtype=np.int64)
        self._ids = np.zeros((slots, 0), dtype=np.int64)
        self._counts = np.zeros((slots, 0), dtype=np.int64)

    def double(self) -> None:
        self.length = np.concatenate((self.length, np.full_like(self.length, -1)))
        self._used = np.concatenate((self._used, np.zeros_like(self._used)))
        self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
        self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))

    def put(self, slot: int, ids: np.ndarray, counts: np.ndarray, length: int) -> None:
        self._make_room(len(ids))
        self._ids[slot, : len(ids)] = ids
        self._counts[slot, : len(ids)] = counts
        self._used[slot] = len(ids)
        self.length[slot] = length

    def append(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """One more token of the answer for each of `slots`, which are distinct."""
        row, at = self._positions(slots)
        same = self._ids[slots[row], at] == tokens[row]
        self._counts[slots[row[same]], at[same]] += 1
        new = np.ones(len(slots), dtype=bool)
        new[row[same]] = False
        fresh, used = slots[new], self._used[slots[new]]
        self._make_room(int(used.max(initial=-1)) + 1)
        self._ids[fresh, used] = tokens[new]
        self._counts[fresh, used] = 1
        self._used[fresh] += 1
        self.length[slots] += 1

    def flat(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(index into `slots`, token, count), all entries one after the other."""
        row, at = self._positions(slots)
        return row, self._ids[slots[row], at], self._counts[slots[row], at]

    def _positions(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        used = self._used[slots]
        row = np.repeat(np.arange(len(slots)), used)
        return row, np.arange(len(row)) - np.repeat(np.cumsum(used) - used, used)

    def _make_room(self, wanted: int) -> None:
        room = self._ids.shape[1]
        if wanted > room:
            self._ids = _widened(self._ids, max(wanted, 2 * room, 64), 0)
            self._counts = _widened(self._counts, max(wanted, 2 * room, 64), 0)


def _widened(table: np.ndarray, columns: int, fill: int) -> np.ndarray:
    wide = np.full((len(table), columns), fill, dtype=table.dtype)
    wide[:, : table.shape[1]] = table
    return wide


_MASK = (1 << 64) - 1


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) for (seed, position) pairs: two rounds of splitmix64 (Steele, Lea, Flood 2014)."""
    mixed = _splitmix64(_splitmix64(seeds.astype(np.uint64)) ^ positions.astype(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Arrays of uint64 wrap around by themselves."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
