"""Sampling: distribution, order of steps, and independence of the batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from engine.sampler import NO_CHANCE, NO_LOGITS, Sampler, sample, uniform
from engine.types import PlanItem, SamplingParams

VOCABULARY = 2000


def item(
    sampling: SamplingParams, position: int = 0, history: list[int] | None = None, prompt_len: int = 1
) -> PlanItem:
    return PlanItem(1, [0], 0, [0], True, position, sampling, prompt_len, history or [0])


def draw(logits: torch.Tensor, *items: PlanItem) -> list[int]:
    return sample(logits, items)[0]


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def test_uniform_numbers_are_pinned_and_uniform() -> None:
    """Pinned: another generator would make a resumed answer differ between two releases."""
    assert [uniform(1, 2), uniform(7, 0)] == [0.7376992526901169, 0.7215081806049702]
    assert 0 <= uniform(2**64 - 1, 0) < 1
    values = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert len(set(values)) == len(values)
    assert abs(sum(values) / len(values) - 0.5) < 0.01


def test_greedy_is_the_argmax() -> None:
    x = logits()
    assert draw(x, item(SamplingParams())) == [int(x.argmax())]


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.7, top_k=5, seed=4),
    SamplingParams(temperature=1.2, top_p=0.8, seed=5),
    SamplingParams(temperature=1.5, top_p=0.999999, seed=6),
    SamplingParams(temperature=1.0, min_p=0.1, seed=7),
    SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=8),
]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x = logits(rows=len(MIXED))
    items = [item(p, position=i, history=[1, 2, 3, 2]) for i, p in enumerate(MIXED)]
    together = draw(x, *items)
    alone = [draw(x[i : i + 1], it)[0] for i, it in enumerate(items)]
    backwards = draw(x.flip(0), *reversed(items))[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize("params", MIXED[1:])
def test_draws_follow_the_distribution_that_transformers_defines(params: SamplingParams) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    history = [1, 2, 3, 2]
    processors: list[Any] = []
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    x = logits(seed=9)
    shaped = LogitsProcessorList(processors)(torch.tensor([history]), x.clone())
    expected = torch.softmax(shaped, dim=-1)[0]
    draws = 3000
    items = [item(params, position=i, history=history, prompt_len=4) for i in range(draws)]
    counts: Counter[int] = Counter()
    for start in range(0, draws, 500):
        counts.update(draw(x.expand(500, -1), *items[start : start + 500]))
    assert all(expected[token] > 0 for token in counts), "a token that the filters exclude was drawn"
    for token in expected.topk(5).indices.tolist():
        assert counts[token] / draws == pytest.approx(float(expected[token]), abs=0.04)


def test_penalties_count_prompt_and_answer_as_defined() -> None:
    x = torch.zeros(1, VOCABULARY)
    x[0, 7], x[0, 8], x[0, 9] = 2.0, 1.9, 1.8
    history = [7, 9, 8, 8]  # prompt 7; answer 9, 8, 8

    def best(**penalties: float) -> int:
        return draw(x, item(SamplingParams(**penalties), history=history, prompt_len=1))[0]

    assert best() == 7
    assert best(repetition_penalty=2.0) == 7, "all three are penalised alike"
    assert best(presence_penalty=1.0) == 7, "the prompt does not count"
    x[0, 7] = -1.0
    assert best() == 8
    assert best(frequency_penalty=0.2) == 9, "8 came twice"
    assert best(presence_penalty=0.2) == 8


def test_stop_tokens_wait_for_min_tokens() -> None:
    x = torch.zeros(1, VOCABULARY)
    x[0, 2], x[0, 3] = 9.0, 5.0
    params = SamplingParams(min_tokens=2, stop_token_ids=frozenset([2]))
    assert [draw(x, item(params, position=p))[0] for p in range(3)] == [3, 3, 2]


def test_logprobs_are_of_the_raw_distribution() -> None:
    x = logits(seed=2)
    params = SamplingParams(temperature=2.0, top_k=1, repetition_penalty=2.0, logprobs=3, seed=1)
    (token,), (value,) = sample(x, [item(params, history=[int(x.argmax())])])
    assert value is not None
    reference = torch.log_softmax(x[0], dim=-1)
    assert value.logprob == pytest.approx(float(reference[token]), abs=1e-5)
    assert [t for t, _ in value.top] == reference.topk(3).indices.tolist()


NAN, INF = float("nan"), float("inf")
KINDS = [*MIXED, SamplingParams(logprobs=2), SamplingParams(temperature=1.0, logit_bias=((3, 1.0),), seed=9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 700, VOCABULARY - 1, slice(None)])
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_logits_that_are_no_numbers_give_a_cause_and_the_neighbours_their_tokens(
    value: float, place: Any, dtype: torch.dtype
) -> None:
    if value == -INF and place != slice(None):
        pytest.skip("a token that cannot come is none of these")
    x = logits(rows=2 * len(KINDS)).to(dtype)
    items = [item(p, position=i // 2, history=[1, 2, 3]) for i, p in enumerate(p for p in KINDS for _ in "ab")]
    before = draw(x, *items)
    x[1::2, place] = value
    drawn = Sampler(VOCABULARY).draw(x, items)
    assert drawn.read()[0][0::2] == before[0::2]
    assert drawn.read()[0][1::2] == [NO_LOGITS] * len(KINDS)
    assert 0 <= int(drawn.tokens.min()) <= int(drawn.tokens.max()) < VOCABULARY, "what the next step may begin with"


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1, "top_k": 9}]
)
def test_what_the_parameters_make_of_good_logits_is_told_from_what_the_model_made(how: dict[str, Any]) -> None:
    """Parameters that a worker would refuse: the draw itself must not give what is no token."""
    x = logits(rows=4)
    broken = [
        SamplingParams(repetition_penalty=1e-38, **how),
        SamplingParams(logit_bias=((5, NAN),), **how),
        SamplingParams(min_tokens=9, stop_token_ids=frozenset(range(VOCABULARY)), **how),
    ]
    history = list(range(VOCABULARY))
    tokens = draw(x, *(item(p, history=history) for p in (*broken, SamplingParams())))
    assert tokens[:3] == [NO_CHANCE] * 3
    assert tokens[3] == int(x[3].argmax())


@pytest.mark.parametrize("temperature", [NAN, INF, 1e-300, 1e-45, 1e38, 1e300])
@pytest.mark.parametrize("other", [{}, {"top_p": 0.9}, {"top_p": 1e-30}, {"top_k": 3}, {"min_p": 1.0}])
def test_a_draw_gives_a_token_or_a_cause_at_any_temperature(temperature: float, other: dict[str, Any]) -> None:
    (token,) = draw(logits(), item(SamplingParams(temperature=temperature, **other)))
    assert 0 <= token < VOCABULARY or token == NO_CHANCE
