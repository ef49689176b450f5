"""Logits to tokens, a batch at a time.

Order per row, as in transformers: logit bias, what may not come (allowed tokens, bad words, grammar, minimum length),
penalties, temperature, top-k, top-p, min-p, draw. A row that needs none of it costs an argmax, whoever its neighbours
are. A draw inverts the cumulative distribution at a number that depends on (seed, position) alone: the same logits give
the same token on any worker, in any batch, after any recovery.

A row whose logits are no numbers, or that leaves no token with a chance, gets a cause in place of a token, and its
neighbours get theirs: an argmax finds the first NaN if there is one, so that the value at its place tells of the row.

A row never looks at another row, not even through a width or a shortlist that a neighbour needs. Where candidates are
ordered, equal logits stand in the order of their ids: bfloat16 has many ties, and torch leaves their order open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.grammar import Masks, hold_back
from engine.sampling_table import Rows, SamplingTable, uniforms
from engine.types import PlanItem
from kv_transfer.handoff import TokenLogprobs

# Candidates that are sorted, as many as a row needs: most top-k fit the first, most nuclei the second. A full sort
# costs milliseconds a row on CPU.
_SHORTLISTS = (64, 1024)

# In place of a token.
NO_LOGITS = -1  # the model's logits: NaN, or infinite, or none above minus infinity
NO_CHANCE = -2  # what logit bias, penalties, grammar and temperature made of them
CAUSES = {
    NO_LOGITS: "the model computed no finite logits at position {}; it, its precision or its device fails there",
    NO_CHANCE: "no token has a finite chance at position {}, after logit bias, allowed tokens, bad words, penalties, "
    "grammar and temperature; use milder ones",
}


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for (seed, position); `seed` is taken modulo 2**64."""
    seeds = np.asarray([seed & ((1 << 64) - 1)], dtype=np.uint64)
    return float(uniforms(seeds, np.asarray([position], dtype=np.int64))[0])


def sample(logits: torch.Tensor, items: Sequence[PlanItem]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """One step of a Sampler that remembers nothing."""
    return Sampler(logits.shape[-1]).sample(logits, items)


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Of `rows` [n]: the chosen token's [n], and the best candidates' ids and values [n, width]; wanted: `counts`."""

    rows: np.ndarray
    counts: np.ndarray
    own: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor

    def of(self, places: np.ndarray) -> _Logprobs:
        """For a larger batch, in which row i is row places[i]."""
        return _Logprobs(places[self.rows], self.counts, self.own, self.ids, self.values)

    def fetched(self) -> _Logprobs:
        return _Logprobs(self.rows, self.counts, fetched(self.own), fetched(self.ids), fetched(self.values))


class Drawn:
    """A step's samples. `tokens` [rows] int64 lie where the logits do, and may be used there before `read`: there, a
    row without a token has token 0.
    """

    def __init__(self, count: int, tokens: torch.Tensor, logprobs: _Logprobs | None) -> None:
        self._count = count
        self.tokens = tokens.clamp_min(0) if _may_lack(tokens) else tokens
        self._logprobs = None if logprobs is None else logprobs.fetched()
        self._on_host = fetched(tokens)
        self._arrived = torch.cuda.current_stream(tokens.device).record_event() if tokens.is_cuda else None

    def read(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Waits for the device, once. In place of a token there may be one of CAUSES."""
        if self._arrived is not None:
            self._arrived.synchronize()
        result: list[TokenLogprobs | None] = [None] * self._count
        found = self._logprobs
        if found is not None:
            columns = found.own.tolist(), found.ids.tolist(), found.values.tolist()
            for i, count, own, ids, values in zip(found.rows.tolist(), found.counts.tolist(), *columns, strict=True):
                result[i] = TokenLogprobs(own, tuple(zip(ids[:count], values[:count], strict=True)))
        return self._on_host.tolist(), result


def fetched(values: torch.Tensor) -> torch.Tensor:
    """On its way to the host, if it is not there."""
    if not values.is_cuda:
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


class Sampler:
    """Remembers each sequence's parameters and token counts from step to step; one thread."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._table = SamplingTable(vocabulary)
        self._masks = Masks(vocabulary)
        self._addends: torch.Tensor | None = None

    def forget(self) -> None:
        """An exception may have left a sequence half known."""
        self._table = SamplingTable(self._vocabulary)

    @property
    def remembered(self) -> int:
        """Sequences whose state is held, present and past."""
        return len(self._table)

    def sample(self, logits: torch.Tensor, items: Sequence[PlanItem]) -> tuple[list[int], list[TokenLogprobs | None]]:
        """`draw`, and wait for it."""
        return self.draw(logits, items).read()

    def draw(self, logits: torch.Tensor, items: Sequence[PlanItem]) -> Drawn:
        """logits [rows, vocabulary] of any float type, one row per item: token ids, and natural-log probabilities of
        the raw distribution where they were asked for.

        Python's part per row is a look-up and, where asked, the log-probabilities' object; the rest is arrays. On CUDA
        nothing here waits for the device, but for rows with top-p and without top-k: how many candidates hold a nucleus
        is seen on the host.
        """
        rows = self._table.look_up(items)
        more = np.flatnonzero(~rows.columns["plain"])
        if not len(more):
            return Drawn(len(items), _greedy(logits, logits), None)
        if len(more) == len(items):
            return Drawn(len(items), *self._sample(logits, rows, items))
        tokens = _greedy(logits, logits)
        drawn, logprobs = self._sample(_take(logits, more), rows.take(more), [items[i] for i in more.tolist()])
        tokens[_to(more, tokens)] = drawn
        return Drawn(len(items), tokens, None if logprobs is None else logprobs.of(more))

    def _sample(
        self, logits: torch.Tensor, rows: Rows, items: Sequence[PlanItem]
    ) -> tuple[torch.Tensor, _Logprobs | None]:
        columns = rows.columns
        raw = logits.float()
        keep = raw is logits or bool((columns["logprobs"] >= 0).any())  # the caller's own, or asked for below
        shaped = self._shape(raw, rows, items, keep)
        chosen = _greedy(shaped, logits)
        warm = np.flatnonzero(columns["temperature"] > 0)
        if len(warm):
            at = _to(warm, chosen)
            drawn = _draw(_take(shaped, warm), columns[warm], rows.numbers[warm])
            if _may_lack(chosen):
                best = chosen[at]
                drawn = torch.where(best < 0, best, drawn)  # why it has no best is why it has none
            chosen[at] = drawn
        return chosen, _logprobs(raw, chosen, columns["logprobs"])

    def _shape(self, raw: torch.Tensor, rows: Rows, items: Sequence[PlanItem], keep: bool) -> torch.Tensor:
        """Logit bias, masks, grammars, minimum length and penalties; with `keep`, `raw` itself stays as it is.

        Repetition (CTRL, Keskar et al. 2019) counts prompt and answer; presence and frequency count the answer.
        """
        columns = rows.columns
        row, stop = self._table.stops(rows)
        penalised = bool(columns["penalised"].any())
        structured = np.flatnonzero(columns["structured"])
        biased = bool(columns["biased"].any())
        masked = bool(columns["masked"].any())
        if not len(row) and not len(structured) and not penalised and not biased and not masked:
            return raw
        shaped = raw.clone() if keep else raw
        if biased:
            at, token, bias = self._table.biases(rows)
            shaped[_to(at, raw), _to(token, raw)] += _to(bias, raw)
        if masked:
            for at, mask in self._table.masks(rows):
                banned = mask.banned(items[at].history, items[at].prompt_len)
                _mask(shaped[at], mask.allowed, banned)
        if len(structured):
            self._forbid(shaped, structured, rows, items)
        if len(row):
            shaped[_to(row, raw), _to(stop, raw)] = -torch.inf
        if penalised:
            row, token, count = self._table.counts(rows, items)
            at = _to(row, raw), _to(token, raw)
            repetition = _to(columns["repetition"][row], raw)
            # In float32, rounded after each operation: as if each row had been shaped on its own with Python's floats.
            deduction = columns["presence"][row] + columns["frequency"][row] * count.astype(np.float32)
            scores = shaped[at]
            scores = torch.where(scores > 0, scores / repetition, scores * repetition)
            shaped[at] = scores - _to(np.where(count > 0, deduction, np.float32(0)), raw)
        return shaped

    def _forbid(self, shaped: torch.Tensor, at: np.ndarray, rows: Rows, items: Sequence[PlanItem]) -> None:
        """What the grammars of rows `at` do not allow becomes -inf, in place."""
        masks = self._masks.fill([matcher for i in at.tolist() if (matcher := items[i].matcher) is not None])
        for i in np.flatnonzero(rows.columns["held_back"][at]).tolist():
            item = items[at[i]]
            hold_back(masks[i], _held_back(item))
        if len(at) == len(shaped):
            self._apply(shaped, masks)
        else:
            which = _to(at, shaped)
            part = shaped[which]
            self._apply(part, masks)
            shaped[which] = part

    def _apply(self, logits: torch.Tensor, masks: np.ndarray) -> None:
        """Packed masks [rows, words] on logits [rows, vocabulary], in place.

        Each byte of a mask finds eight addends, 0 or -inf: on CPU three times as fast as unpacking and masked_fill_.
        """
        if self._addends is None or self._addends.device != logits.device:
            bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
            self._addends = torch.from_numpy(np.where(bits, np.float32(0), np.float32(-np.inf))).to(logits.device)
        eighths, rest = divmod(logits.shape[-1], 8)
        wanted = _to(masks.view(np.uint8), logits).int()
        whole = logits[:, : 8 * eighths].unflatten(1, (eighths, 8))
        whole += torch.nn.functional.embedding(wanted[:, :eighths], self._addends)
        if rest:
            logits[:, 8 * eighths :] += self._addends[wanted[:, eighths]][:, :rest]


def _mask(logits: torch.Tensor, allowed: np.ndarray | None, banned: np.ndarray) -> None:
    """One row [vocabulary], in place."""
    if allowed is not None:
        at = _to(allowed, logits)
        kept = logits[at]
        logits.fill_(-torch.inf)
        logits[at] = kept
    if len(banned):
        logits[_to(banned, logits)] = -torch.inf


def _held_back(item: PlanItem) -> list[int]:
    """What must not end this answer yet, if anything else may come: any end before min_tokens, and with ignore_eos (the
    model's own end is no stop token then) that end for good.
    """
    assert item.matcher is not None
    stops, ends = item.sampling.stop_token_ids, item.matcher.end_tokens
    if item.position < item.sampling.min_tokens:
        return [*stops, *ends]
    return [token for token in ends if token not in stops]


def _to(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    staged = torch.from_numpy(array.copy())
    if not like.is_cuda:
        return staged
    return staged.pin_memory().to(like.device, non_blocking=True)  # from pageable memory the copy would be waited for


def _greedy(shaped: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """Each row's first maximum, or why it has none. `raw`: the model's, which `shaped` are or were made from.

    On CPU numpy finds it ten times faster than torch: 0.2 against 2.2 ms at batch 32.
    """
    if shaped.device.type == "cpu":
        values = shaped.float().numpy()
        best = values.argmax(-1)
        if np.isfinite(values[np.arange(len(values)), best]).all():
            return torch.from_numpy(best)
        found = torch.from_numpy(best)
    else:
        found = shaped.argmax(dim=-1)
    at = found[:, None]
    cause = torch.where(torch.isfinite(raw.gather(-1, at)), NO_CHANCE, NO_LOGITS)
    return torch.where(torch.isfinite(shaped.gather(-1, at)), at, cause)[:, 0]


def _may_lack(tokens: torch.Tensor) -> bool:
    """Whether some of them may be causes; on CUDA, where to look would be to wait, they may."""
    return tokens.is_cuda or bool((tokens.numpy() < 0).any())


def _take(values: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """values[rows]; `rows` ascend, so all of them are the tensor itself."""
    return values if len(rows) == len(values) else values[_to(rows, values)]


def _draw(logits: torch.Tensor, columns: np.ndarray, numbers: np.ndarray) -> torch.Tensor:
    """logits [rows, vocabulary] float32 -> token ids [rows]. Rows of one kind are computed together."""
    vocabulary = logits.shape[-1]
    chosen = torch.empty(len(columns), dtype=torch.int64, device=logits.device)
    top_k = np.where((columns["top_k"] <= 0) | (columns["top_k"] >= vocabulary), vocabulary, columns["top_k"])
    plain = (top_k == vocabulary) & (columns["top_p"] >= 1)

    at = np.flatnonzero(plain)
    if len(at):
        chosen[_to(at, chosen)] = _draw_plain(_take(logits, at), columns[at], numbers[at])

    # A row with top-k goes where its candidates fit; one with top-p alone tries the shortlists in turn.
    widths = [width for width in _SHORTLISTS if width < vocabulary] + [vocabulary]
    limited = top_k < vocabulary
    fit = np.searchsorted(widths, top_k)
    for i, width in enumerate(widths):
        at = np.flatnonzero(limited & (fit == i))
        if len(at):
            chosen[_to(at, chosen)] = _draw_top_k(_take(logits, at), columns[at], numbers[at], width)
    waiting = np.flatnonzero(~plain & ~limited)
    for width in widths:
        if not len(waiting):
            break
        drawn, covered = _draw_top_p(_take(logits, waiting), columns[waiting], numbers[waiting], width)
        chosen[_to(waiting[covered], chosen)] = _take(drawn, np.flatnonzero(covered))
        waiting = waiting[~covered]
    return chosen


def _draw_plain(logits: torch.Tensor, columns: np.ndarray, numbers: np.ndarray) -> torch.Tensor:
    weights = torch.softmax(logits.double() / _to(columns["temperature"], logits)[:, None], dim=-1)
    if columns["min_p"].any():
        weights *= weights >= _to(columns["min_p"], logits)[:, None] * weights.amax(dim=-1, keepdim=True)
    return _invert(weights, _to(numbers, logits)[:, None])


def _draw_top_k(logits: torch.Tensor, columns: np.ndarray, numbers: np.ndarray, width: int) -> torch.Tensor:
    """Token ids [rows]; every row's top_k is at most `width`. The rest of the vocabulary does not matter."""
    ids = best_ids(logits, width)
    weights = logits.gather(-1, ids).double() / _to(columns["temperature"], logits)[:, None]
    weights = torch.exp(weights - weights[:, :1])
    weights *= torch.arange(width, device=logits.device) < _to(columns["top_k"], logits)[:, None]
    running = weights.cumsum(dim=-1)
    # The nucleus is a share of what top-k left over, as when the two are applied one after the other.
    return _draw_nucleus(ids, weights, running, running[:, -1:], columns, numbers)


def _draw_top_p(
    logits: torch.Tensor, columns: np.ndarray, numbers: np.ndarray, width: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Token ids [rows], and for which rows [rows] the `width` best candidates hold the nucleus.

    Those rows get the same token from any larger width.
    """
    ids = best_ids(logits, width)
    # Shares of the whole vocabulary: the sum of a shortlist must not stand in for it.
    weights = torch.softmax(logits.double() / _to(columns["temperature"], logits)[:, None], dim=-1).gather(-1, ids)
    running = weights.cumsum(dim=-1)
    covered = np.ones(len(columns), dtype=bool)
    if width < logits.shape[-1]:
        covered = (running[:, -1] >= _to(columns["top_p"], logits)).cpu().numpy()
    return _draw_nucleus(ids, weights, running, torch.ones_like(running[:, -1:]), columns, numbers), covered


def _draw_nucleus(
    ids: torch.Tensor,
    weights: torch.Tensor,
    running: torch.Tensor,
    total: torch.Tensor,
    columns: np.ndarray,
    numbers: np.ndarray,
) -> torch.Tensor:
    """Top-p of `total`, min-p and the draw, over candidates in order: ids and weights [rows, width]."""
    weights = weights * (running - weights < _to(columns["top_p"], weights)[:, None] * total)
    if columns["min_p"].any():
        weights *= weights >= _to(columns["min_p"], weights)[:, None] * weights[:, :1]
    index = _invert(weights, _to(numbers, weights)[:, None])
    return torch.where(index < 0, index, ids.gather(-1, index.clamp_min(0)[:, None])[:, 0])


def best_ids(values: torch.Tensor, width: int) -> torch.Tensor:
    """Ids [rows, width] of the largest float32 values, largest first, equal ones by id: the same for every width.

    torch leaves open which of equal values topk takes. So twice as many are taken: unless all of the second half are
    equal to the last one wanted, every candidate for its place is among them, and sorting those few decides.
    On CUDA, where to look whether they are would be to wait for the device, all are compared with their ids.
    """
    if values.is_cuda:
        return _ids(_keys(values, torch.arange(values.shape[-1], device=values.device)).topk(width, dim=-1).values)
    if 2 * width >= values.shape[-1]:
        return _in_order(values, torch.arange(values.shape[-1], device=values.device).expand_as(values))[:, :width]
    found, ids = values.topk(2 * width, dim=-1)
    ids = _in_order(found, ids)[:, :width]
    undecided = (found[:, width - 1] == found[:, -1]).nonzero()[:, 0]
    if len(undecided):
        keys = _keys(values[undecided], torch.arange(values.shape[-1], device=values.device))
        ids[undecided] = _ids(keys.topk(width, dim=-1).values)
    return ids


def _in_order(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return _ids(_keys(values, ids).sort(dim=-1, descending=True).values)


def _keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64, all different, in the order wanted: the value's bits made monotone, below them the id's complement."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    return (ordered << 32) + (0x7FFFFFFF - ids)


def _ids(keys: torch.Tensor) -> torch.Tensor:
    return 0x7FFFFFFF - (keys & 0xFFFFFFFF)


def _invert(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """First index at which the running sum exceeds number x total, or NO_CHANCE. Never an index of weight 0."""
    running = weights.cumsum(dim=-1)
    total = running[:, -1:].contiguous()
    index = torch.searchsorted(running, numbers * total, right=True)
    # number x total may round up to the total itself: then the index that reached it.
    index = torch.minimum(index, torch.searchsorted(running, total))
    return torch.where(total < torch.inf, index, NO_CHANCE)[:, 0]  # not a number is not less


def _logprobs(raw: torch.Tensor, chosen: torch.Tensor, wanted: np.ndarray) -> _Logprobs | None:
    """`wanted` [rows]: how many alternatives, -1 for none of it."""
    rows = np.flatnonzero(wanted >= 0)
    if not len(rows):
        return None
    distribution = torch.log_softmax(_take(raw, rows), dim=-1)
    own = distribution.gather(-1, _take(chosen, rows).clamp_min(0)[:, None])[:, 0]
    ids = best_ids(distribution, max(int(wanted.max()), 1))
    return _Logprobs(rows, wanted[rows], own, ids, distribution.gather(-1, ids))
