"""Logits to tokens, a batch at a time.

Order per row, as in transformers: minimum length, penalties, temperature, top-k, top-p, min-p, draw. A draw inverts
the cumulative distribution at a number that depends on (seed, position) alone: the same logits give the same
token on any worker, in any batch, after any recovery.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.types import PlanItem, SamplingParams
from kv_transfer.handoff import TokenLogprobs

_SHORTLIST = 1024  # most top-p nuclei fit; a full sort costs milliseconds a row on CPU


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for (seed, position): two rounds of splitmix64 (Steele, Lea, Flood 2014)."""
    return (_splitmix64(_splitmix64(seed & _MASK) ^ (position & _MASK)) >> 11) * 2.0**-53


_MASK = (1 << 64) - 1


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def sample(logits: torch.Tensor, items: Sequence[PlanItem]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """logits [rows, vocabulary], one row per item. Returns token ids and log-probabilities (None if not asked)."""
    if all(_plainly_greedy(item.sampling) for item in items):
        return logits.argmax(dim=-1).tolist(), [None] * len(items)
    raw = logits.float()
    shaped = _shape(raw, items)
    chosen = shaped.argmax(dim=-1)
    rows = [i for i, item in enumerate(items) if item.sampling.temperature > 0]
    if rows:
        drawn = _draw(shaped[rows], [items[i] for i in rows])
        chosen[torch.as_tensor(rows, device=chosen.device)] = drawn
    tokens = chosen.tolist()
    return tokens, _logprobs(raw, tokens, items)


def _plainly_greedy(p: SamplingParams) -> bool:
    return p.temperature == 0 and p.logprobs is None and not p.min_tokens and not _penalised(p)


def _penalised(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def _shape(raw: torch.Tensor, items: Sequence[PlanItem]) -> torch.Tensor:
    """Minimum length and penalties; `raw` itself stays as it is."""
    short = [
        (i, item.sampling.stop_token_ids)
        for i, item in enumerate(items)
        if item.position < item.sampling.min_tokens and item.sampling.stop_token_ids
    ]
    penalised = [i for i, item in enumerate(items) if _penalised(item.sampling)]
    if not short and not penalised:
        return raw
    shaped = raw.clone()
    for i, stop_ids in short:
        shaped[i, list(stop_ids)] = -torch.inf
    for i in penalised:
        _penalise(shaped[i], items[i])
    return shaped


def _penalise(row: torch.Tensor, item: PlanItem) -> None:
    """Repetition (CTRL, Keskar et al. 2019) over prompt and answer; presence and frequency over the answer."""
    p = item.sampling
    if p.repetition_penalty != 1:
        seen = torch.as_tensor(np.unique(np.asarray(item.history)), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / p.repetition_penalty, scores * p.repetition_penalty)
    answer = item.history[item.prompt_len :]
    if (p.presence_penalty or p.frequency_penalty) and answer:
        ids, counts = np.unique(np.asarray(answer), return_counts=True)
        at = torch.as_tensor(ids, device=row.device)
        row[at] -= p.presence_penalty + p.frequency_penalty * torch.as_tensor(
            counts, device=row.device, dtype=row.dtype
        )


def _draw(logits: torch.Tensor, items: Sequence[PlanItem]) -> torch.Tensor:
    device = logits.device
    params = [item.sampling for item in items]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    scaled = logits.double() / column([p.temperature for p in params])
    # Shares of the whole vocabulary, so that the cut of top-p does not depend on how many candidates were sorted.
    probabilities = torch.softmax(scaled, dim=-1)
    numbers = column([uniform(p.seed, item.position) for p, item in zip(params, items, strict=True)])
    min_p = column([p.min_p for p in params])
    chosen = torch.empty(len(items), dtype=torch.int64, device=device)

    plain = [i for i, p in enumerate(params) if p.top_k == 0 and p.top_p >= 1]
    if plain:
        kept = probabilities[plain]
        kept = kept * (kept >= min_p[plain] * kept.amax(dim=-1, keepdim=True))
        chosen[plain] = _invert(kept, numbers[plain])

    ordered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if ordered:
        top_k = torch.tensor([params[i].top_k or logits.shape[-1] for i in ordered], device=device)[:, None]
        top_p = column([params[i].top_p for i in ordered])
        chosen[ordered] = _draw_ordered(probabilities[ordered], numbers[ordered], top_k, top_p, min_p[ordered])
    return chosen


def _draw_ordered(
    probabilities: torch.Tensor,
    numbers: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    vocabulary = probabilities.shape[-1]
    width = min(_SHORTLIST, vocabulary)
    best, ids = probabilities.topk(width, dim=-1)
    if width < vocabulary:
        covered = (top_k <= width) | (best.sum(dim=-1, keepdim=True) >= top_p)
        if not bool(covered.all()):
            best, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    best = best * (torch.arange(best.shape[-1], device=best.device) < top_k)
    # The nucleus is a share of what top-k left over, as when the two are applied one after the other. Without top-k
    # that is the whole vocabulary: the sum of a shortlist must not stand in for it.
    left_over = torch.where(top_k < vocabulary, best.sum(dim=-1, keepdim=True), 1.0)
    best = best * (best.cumsum(dim=-1) - best < top_p * left_over)
    best = best * (best >= min_p * best[:, :1])
    return ids.gather(-1, _invert(best, numbers)[:, None])[:, 0]


def _invert(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """First index at which the running sum exceeds number x total. Never an index of weight 0."""
    running = weights.cumsum(dim=-1)
    target = numbers * running[:, -1:]
    index = torch.searchsorted(running, target, right=True)[:, 0]
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).to(torch.int8).argmax(dim=-1)
    return torch.minimum(index, last)


def _logprobs(raw: torch.Tensor, tokens: Sequence[int], items: Sequence[PlanItem]) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(items)
    rows = [i for i, item in enumerate(items) if item.sampling.logprobs is not None]
    if not rows:
        return result
    distribution = torch.log_softmax(raw[rows], dim=-1)
    widest = max(items[i].sampling.logprobs or 0 for i in rows)
    values, ids = distribution.topk(max(widest, 1), dim=-1)
    for at, i in enumerate(rows):
        count = items[i].sampling.logprobs or 0
        top = tuple(zip(ids[at, :count].tolist(), values[at, :count].tolist(), strict=True))
        result[i] = TokenLogprobs(float(distribution[at, tokens[i]]), top)
    return result
