"""Prompts make way for decodes: in virtual time, on a CPU-like and a GPU-like machine."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.chunk_budget import UNLIMITED, Allowance, ChunkBudget
from engine.step_cost import StepCost, StepCostEstimate, StepShape
from tests.support.virtual_engine import VirtualEngine

CPU = StepCost(15.0, 1.2, 0.33, 0.0005, 0.00002)
LARGE = 10_000  # ids of the large prompts


def cpu_ms(shape: StepShape) -> float:
    return CPU.ms(shape.sequences, shape.tokens, shape.context_tokens, shape.attention_pairs)


def gpu_ms(shape: StepShape) -> float:
    """A roofline: reading the weights takes 4 ms however few tokens there are."""
    return (
        1.0
        + 0.005 * shape.sequences
        + max(4.2, 0.0295 * shape.tokens)
        + 3.4e-5 * shape.context_tokens
        + 9.6e-7 * shape.attention_pairs
    )


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def running(engine: VirtualEngine, decodes: int = 16) -> VirtualEngine:
    """After a while of decodes that were received, or computed before anybody decoded."""
    for i in range(decodes):
        engine.add(i, 512, 20_000)
    for _ in range(30):
        engine.step()
    engine.forget_steps()
    return engine


def prefill(engine: VirtualEngine, prompts: int = 6, tokens: int = 4096) -> list[float]:
    """All gaps between the decodes' tokens while the prompts are computed, in ms."""
    for i in range(prompts):
        engine.add(LARGE + i, tokens, 1)
    began = engine.now
    while not all(engine.token_times[LARGE + i] for i in range(prompts)):
        assert engine.step()
    times = [t for t in engine.token_times[0] if t >= began]
    return [(b - a) * 1e3 for a, b in zip([began, *times], times, strict=False)]


@pytest.mark.parametrize(
    ("machine", "target_ms"), [(cpu_ms, 100.0), (cpu_ms, 250.0), (gpu_ms, 10.0), (gpu_ms, 25.0), (gpu_ms, 60.0)]
)
def test_decodes_keep_their_target_while_long_prompts_are_computed(machine: object, target_ms: float) -> None:
    engine = running(VirtualEngine(machine, target_ms))  # type: ignore[arg-type]
    gaps = prefill(engine)
    assert percentile(gaps, 0.99) <= 0.87 * target_ms
    assert max(gaps) <= target_ms
    # What the target allows is used: most steps come near their share.
    assert percentile(gaps, 0.5) >= 0.7 * target_ms


def test_without_a_target_they_wait_for_whole_prompts() -> None:
    gaps = prefill(running(VirtualEngine(cpu_ms)))
    assert max(gaps) > 1000


def test_noise_does_not_make_it_swing() -> None:
    """10 % of noise: the steps' expected durations stay near the share, and chunks do not jump."""
    rng = random.Random(5)
    engine = running(VirtualEngine(lambda shape: cpu_ms(shape) * max(0.5, rng.gauss(1, 0.1)), 100.0))
    prefill(engine)
    mixed = [s for s in engine.shapes if s.prompt_tokens and s.sequences > 16]
    expected = [cpu_ms(s) for s in mixed]
    assert percentile(expected, 0.95) <= 90
    assert percentile(expected, 0.05) >= 65
    sizes = [s.prompt_tokens for s in mixed]
    jumps = [abs(b - a) for a, b in itertools.pairwise(sizes)]
    assert percentile([float(j) for j in jumps], 0.95) <= 32


def test_where_decodes_leave_nothing_prompts_still_go_on() -> None:
    engine = running(VirtualEngine(cpu_ms, 55.0))
    gaps = prefill(engine, prompts=1)
    chunks = [s.prompt_tokens for s in engine.shapes if s.prompt_tokens]
    assert set(chunks) == {32}
    assert max(gaps) < 62  # 16 decodes take 44 ms, and 32 tokens more 12 to 14


def test_a_target_that_decodes_alone_miss_does_not_starve_prompts() -> None:
    engine = running(VirtualEngine(cpu_ms, 50.0), decodes=64)
    engine.step()
    alone = engine.durations_ms[0]
    assert alone > 120
    gaps = prefill(engine, prompts=1)
    chunks = [s.prompt_tokens for s in engine.shapes if s.prompt_tokens]
    assert percentile([float(c) for c in chunks], 0.5) >= 64
    assert percentile(gaps, 0.5) < 1.3 * alone


@given(
    st.lists(st.tuples(st.integers(1, 600), st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=12),
    st.floats(1, 500),
    st.integers(20, 80),
)
@settings(max_examples=40)
def test_every_answer_ends_whatever_the_target_and_the_room(
    requests: list[tuple[int, int, int]], target_ms: float, num_blocks: int
) -> None:
    """Arrivals between steps, preemption where the pool is small: nothing starves and the accounts agree."""
    engine = VirtualEngine(cpu_ms, target_ms, num_blocks=num_blocks)
    for sequence_id, (prompt_tokens, max_tokens, steps) in enumerate(requests):
        engine.add(sequence_id, prompt_tokens, max_tokens)
        for _ in range(steps):
            engine.step()
    for _ in range(3000):
        if not engine.step():
            break
        engine.core.check()
    assert engine.core.is_idle()
    assert [len(engine.token_times[i]) for i in range(len(requests))] == [r[1] for r in requests]


def test_nobody_decodes_so_prompts_get_the_whole_step() -> None:
    engine = VirtualEngine(cpu_ms, 50.0, max_batch_tokens=2048)
    engine.add(1, 4096, 1)
    engine.step()
    assert engine.shapes[0].prompt_tokens == 2048


def test_nothing_is_known_so_the_first_chunks_are_small() -> None:
    """Decodes whose KV was received: no prompt was ever computed here."""
    estimate = StepCostEstimate()
    budget = ChunkBudget(100.0, estimate)
    sizes = []
    for _ in range(5):
        size = budget.allowance(16, 8000).tokens(0)
        sizes.append(size)
        estimate.observe(StepShape(17, 16 + size, 8000, size * size / 2, size), 40 + 0.01 * size)
    assert sizes == [32, 64, 128, 256, 512]


def test_two_prompts_share_what_a_step_may_spend() -> None:
    engine = running(VirtualEngine(gpu_ms, 25.0))
    for i in range(8):
        engine.add(LARGE + i, 100, 1)
    engine.forget_steps()
    engine.step()
    assert 19 < engine.shapes[0].sequences < 16 + 8  # several at once, not all
    assert engine.durations_ms[0] <= 25.0


def test_without_target_or_decodes_there_is_no_limit() -> None:
    assert ChunkBudget(None, StepCostEstimate()).allowance(16, 1000) is UNLIMITED
    assert ChunkBudget(50.0, StepCostEstimate()).allowance(0, 0) is UNLIMITED
    assert UNLIMITED.tokens(123) > 1 << 30
    assert UNLIMITED.open
    UNLIMITED.spend(0, 1 << 30)
    assert UNLIMITED.tokens(0) > 1 << 30


costs = st.builds(
    StepCost,
    constant_ms=st.floats(0, 1e3),
    per_sequence_ms=st.floats(0, 10),
    per_token_ms=st.floats(0, 10),
    per_context_token_ms=st.floats(0, 1),
    per_attention_pair_ms=st.floats(0, 1e-2),
)


@given(costs, st.floats(-1e3, 1e4), st.integers(32, 8192), st.lists(st.integers(0, 1 << 17), min_size=1, max_size=6))
def test_the_first_prompt_always_goes_on_and_the_rest_fits(
    cost: StepCost, left_ms: float, most: int, starts: list[int]
) -> None:
    allowance = Allowance(cost, left_ms, most, 32)
    spent_ms, total = 0.0, 0
    for i, start in enumerate(starts):
        tokens = allowance.tokens(start)
        assert tokens % 16 == 0
        assert tokens >= (32 if i == 0 else 0)
        total += tokens
        assert total <= most
        if tokens == 0:
            continue
        allowance.spend(start, tokens)
        spent_ms += cost.ms(1, tokens, 0, tokens * (start + tokens / 2)) - cost.constant_ms
        assert spent_ms <= left_ms * (1 + 1e-9) + 1e-6 or (i == 0 and tokens == 32) or spent_ms == 0
        if spent_ms > left_ms:
            assert allowance.tokens(start) == 0
