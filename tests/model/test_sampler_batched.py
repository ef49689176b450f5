"""The sampler over many rows and steps: no row sees its neighbours, its place, or what the sampler remembers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampler import Sampler, sample, uniform
from engine.types import PlanItem, SamplingParams

VOCABULARY = 1500  # more than the widest shortlist

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5, 64, 65, 1100, VOCABULARY, 10**9]),
    top_p=st.sampled_from([1.0, 0.999999, 0.9, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.sampled_from([frozenset(), frozenset([2]), frozenset([0, 7, 9, 10**9])]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.2, -0.1]),
    logprobs=st.sampled_from([None, 0, 1, 5, 20]),
)


@st.composite
def rows(draw: st.DrawFn) -> tuple[PlanItem, torch.Tensor]:
    """An item and its logits. Coarse logits are full of ties; flat ones need the whole vocabulary for a nucleus."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale, grain = draw(st.sampled_from([(3.0, 0.0), (3.0, 0.5), (0.01, 0.0), (0.0, 0.0), (8.0, 0.125)]))
    values = rng.standard_normal(VOCABULARY) * scale
    if grain:
        values = np.round(values / grain) * grain
    prompt_len, position = draw(st.integers(1, 30)), draw(st.integers(0, 30))
    history = rng.integers(0, draw(st.sampled_from([12, VOCABULARY])), prompt_len + position).tolist()
    item = PlanItem(1, [0], 0, [0], True, position, draw(params), prompt_len, history)
    return item, torch.from_numpy(values.astype(np.float32))


@settings(deadline=None, max_examples=150)
@given(st.lists(rows(), min_size=2, max_size=9), st.randoms(use_true_random=False), st.booleans())
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(batch, random, half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    items = [item for item, _ in batch]
    logits = torch.stack([row for _, row in batch]).to(dtype)
    tokens, logprobs = sample(logits, items)
    alone = [sample(logits[i : i + 1], [item]) for i, item in enumerate(items)]
    assert tokens == [a[0][0] for a in alone]
    assert logprobs == [a[1][0] for a in alone], "to the last bit"
    order = list(range(len(items)))
    random.shuffle(order)
    order = order[: random.randint(1, len(order))]
    some_tokens, some_logprobs = sample(logits[order], [items[i] for i in order])
    assert some_tokens == [tokens[i] for i in order]
    assert some_logprobs == [logprobs[i] for i in order]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_the_sampler_remembers_changes_nothing(data: st.DataObject) -> None:
    """Sequences come, pause, leave and grow, by one token or (adopted from elsewhere) by several."""
    sampler = Sampler(VOCABULARY)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    live: list[tuple[SamplingParams, int, list[int]]] = []
    for _ in range(data.draw(st.integers(2, 12))):
        for p in data.draw(st.lists(params, max_size=3)):
            live.append((p, 4, rng.integers(0, 20, 4).tolist()))
        if live and data.draw(st.booleans()):
            live.pop(data.draw(st.integers(0, len(live) - 1)))
        chosen = [entry for entry in live if data.draw(st.booleans())]
        if not chosen:
            continue
        logits = torch.from_numpy(rng.standard_normal((len(chosen), VOCABULARY)).astype(np.float32))
        items = [PlanItem(1, [0], 0, [0], True, len(h) - n, p, n, h) for p, n, h in chosen]
        found = sampler.sample(logits, items)
        assert found == sample(logits, items)
        for (_, _, history), token in zip(chosen, found[0], strict=True):
            history.append(token)
            history += rng.integers(0, 20, data.draw(st.sampled_from([0, 0, 0, 3]))).tolist()


def test_many_sequences_take_turns_in_one_sampler() -> None:
    """More sequences than slots, in one step and over many: slots are taken back, and the table grows."""
    sampler = Sampler(VOCABULARY)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        items = [
            PlanItem(
                1, [0], 0, [0], True, 2, SamplingParams(seed=i, temperature=1.0, frequency_penalty=i / 50), 1, [0, i, i]
            )
            for i in range(step, 40 * step + 60)
        ]
        logits = torch.randn(len(items), VOCABULARY, generator=generator)
        for _ in range(2):
            assert sampler.sample(logits, items) == sample(logits, items)
    assert sampler.remembered < 1200


def test_ties_are_taken_in_order_of_ids() -> None:
    """The order of equal logits must not depend on how many candidates a row or its neighbour needs."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, -1] = -1.0
    for top_k in (1, 10, 100, 1200):
        drawn = {
            sample(logits, [PlanItem(1, [0], 0, [0], True, i, SamplingParams(1.0, top_k=top_k, seed=5), 1, [0])])[0][0]
            for i in range(200)
        }
        assert max(drawn) < top_k
    ((value,),) = (sample(logits, [PlanItem(1, [0], 0, [0], True, 0, SamplingParams(logprobs=4), 1, [0])])[1],)
    assert value is not None
    assert [token for token, _ in value.top] == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_the_draw_inverts_the_cumulative_distribution_at_the_pinned_number(seed: int) -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3))
    cumulative = torch.softmax(logits[0].double(), dim=-1).cumsum(dim=-1)
    for position in range(50):
        expected = int(torch.searchsorted(cumulative, uniform(seed, position) * cumulative[-1], right=True))
        item = PlanItem(1, [0], 0, [0], True, position, SamplingParams(temperature=1.0, seed=seed), 1, [0])
        assert sample(logits, [item])[0] == [expected]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 5), st.integers(0, 2**32))
def test_packed_masks_forbid_what_their_bits_say(vocabulary: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 2**32, (rows, -(-vocabulary // 32)), dtype=np.uint32)
    logits = torch.from_numpy(rng.standard_normal((rows, vocabulary)).astype(np.float32))
    masked = logits.clone()
    Sampler(vocabulary)._apply(masked, masks)
    for row in range(rows):
        for token in range(vocabulary):
            allowed = masks[row, token // 32] >> np.uint32(token % 32) & np.uint32(1)
            assert masked[row, token] == (logits[row, token] if allowed else -torch.inf)
