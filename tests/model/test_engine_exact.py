"""The engine on the embedded model, against plain transformers, token for token in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.forward import TorchForward
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec
from tests.support.prompts import reference_greedy, tokens_of
from tests.support.tiers import tiered
from tests.support.triton_interpreter import ON_GPU

BLOCK = 32


def runner_of(model_path: Path, kernels: str) -> ModelRunner:
    config = {"model": str(model_path), "dtype": "float32", "num_blocks": 200, "threads": 1, "kernels": kernels}
    return ModelRunner(EngineConfig.model_validate(config))


# Torch's layers: test_combinations and test_families have them on tiny models.
@pytest.fixture(scope="module", params=["torch"] if ON_GPU else tiered(["native"], ["torch"]))
def runner(request: pytest.FixtureRequest, model_path: Path) -> ModelRunner:
    runner = runner_of(model_path, request.param)
    assert ON_GPU or runner.forward.name.startswith("native stack") == (request.param == "native")
    return runner


class Engine:
    def __init__(self, runner: ModelRunner, num_blocks: int = 200, max_batch_tokens: int = 512, **limits: Any) -> None:
        self.runner = runner
        self.pool = BlockPool(num_blocks, np.zeros(200, dtype=np.uint64))
        values: dict[str, Any] = {
            "max_running_sequences": 16,
            "max_waiting_sequences": 64,
            "context_limit_tokens": 8192,
        }
        values |= limits
        self.core = EngineCore(
            EngineLimits(BLOCK, max_batch_tokens, vocab_size=runner.facts.vocab_size, **values), self.pool
        )
        self.answers: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}

    def add(self, number: int, prompt: list[int], max_tokens: int, **options: Any) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset([2]))
        assert self.core.add(SequenceSpec(number, prompt, sampling, **options), 0.0) is None
        self.answers.setdefault(number, [])

    def steps(self) -> Iterator[int]:
        while (plan := self.core.schedule(0.0)) is not None:
            events = self.core.commit(plan, self.runner.execute(plan), 0.0)
            for token in events.tokens:
                self.answers[token.sequence_id].append(token.token_id)
            for end in events.ends:
                self.cached[end.sequence_id] = end.cached_tokens
            yield plan.num_tokens

    def run(self) -> None:
        for _ in self.steps():
            pass
        self.core.check()


@pytest.mark.parametrize("budget", tiered([100], [512, 37]))
def test_concurrent_prompts_in_any_chunk_size(
    runner: ModelRunner, model_path: Path, tokenizer: Any, budget: int
) -> None:
    engine = Engine(runner, max_batch_tokens=budget)
    prompts = {n: tokens_of(tokenizer, n, seed=n) for n in (1, 5, 32, 33, 70, 129, 300)}
    for n, prompt in prompts.items():
        engine.add(n, prompt, 8)
    engine.run()
    for n, prompt in prompts.items():
        assert engine.answers[n] == reference_greedy(str(model_path), prompt, 8), n
    assert engine.pool.is_idle()


def test_preemption_and_prefix_hits_change_nothing(runner: ModelRunner, model_path: Path, tokenizer: Any) -> None:
    engine = Engine(runner, num_blocks=7, max_running_sequences=4)
    prompt = tokens_of(tokenizer, 62, seed=8)
    other = tokens_of(tokenizer, 60, seed=9)
    for number, tokens in ((1, prompt), (2, other), (3, prompt)):
        engine.add(number, tokens, 20)
    engine.run()
    assert engine.core.load().preemptions_total > 0
    for number, tokens in ((1, prompt), (2, other), (3, prompt)):
        assert engine.answers[number] == reference_greedy(str(model_path), tokens, 20), number
    engine.add(4, prompt, 20)
    engine.run()
    assert engine.cached[4] == 32
    assert engine.answers[4] == engine.answers[1]
    assert engine.pool.is_idle()


def test_copied_kv_decodes_as_computed_kv(runner: ModelRunner, model_path: Path, tokenizer: Any) -> None:
    """What a handoff does, without the network: blocks move, the sequence goes on."""
    prompt = tokens_of(tokenizer, 75, seed=5)
    engine = Engine(runner)
    engine.add(1, prompt, 10, hand_over=True, retain=True)
    engine.run()
    engine.add(2, prompt, 10, hold=True, cache_salt="another worker")
    room = engine.core.reserve(2, len(prompt), 0.0)
    assert room is not None
    for source, target in zip(engine.core.block_table(1), room.block_ids, strict=True):
        runner.kv[target] = runner.kv[source]
    engine.answers[2] = list(engine.answers[1])
    engine.core.adopt(2, len(prompt), engine.answers[1], 0.0)
    engine.run()
    assert engine.answers[2] == reference_greedy(str(model_path), prompt, 10)
    engine.core.drop(1)
    assert engine.pool.is_idle()


@pytest.mark.long  # test_bfloat16 has the quick one
def test_bfloat16_stays_close_to_float32(model_path: Path, tokenizer: Any) -> None:
    """Stated bound: the log-probability of the same next token differs by less than 0.15."""
    prompt = tokens_of(tokenizer, 120, seed=6)
    values = {}
    for dtype in ("float32", "bfloat16"):
        runner = ModelRunner(EngineConfig(model=str(model_path), dtype=dtype, num_blocks=8, threads=1))
        core = EngineCore(EngineLimits(BLOCK, 512, 8, 8, 8192, runner.facts.vocab_size), BlockPool(8))
        core.add(SequenceSpec(1, prompt, SamplingParams(max_tokens=1, logprobs=5)), 0.0)
        plan = core.schedule(0.0)
        assert plan is not None
        (event,) = core.commit(plan, runner.execute(plan), 0.0).tokens
        assert event.logprobs is not None
        values[dtype] = dict(event.logprobs.top)
    shared = values["float32"].keys() & values["bfloat16"].keys()
    assert len(shared) >= 3
    for token in shared:
        assert abs(values["float32"][token] - values["bfloat16"][token]) < 0.15


def test_the_chunk_budget_changes_no_token(runner: ModelRunner, model_path: Path, tokenizer: Any) -> None:
    """Prompts come beside decodes and are cut by what steps are seen to cost, in virtual time: 1 ms and 0.2 a token."""
    engine = Engine(runner, max_batch_tokens=512, itl_target_ms=20.0)
    prompts = {n: tokens_of(tokenizer, n, seed=n) for n in (20, 33, 150, 280)}
    arrivals = {0: (20,), 2: (33,), 5: (150, 280)}  # by step
    now, beside_decodes = 0.0, []
    for step in range(100):
        for n in arrivals.get(step, ()):
            engine.add(n, prompts[n], 16)
        plan = engine.core.schedule(now)
        if plan is None:
            break
        chunks = [len(item.token_ids) for item in plan.items]
        if min(chunks) == 1 < max(chunks):
            beside_decodes.append(sum(chunks))
        result = runner.execute(plan)
        now += (1.0 + 0.2 * plan.num_tokens) / 1e3
        for token in engine.core.commit(plan, result, now).tokens:
            engine.answers[token.sequence_id].append(token.token_id)
    engine.core.check()
    assert len(beside_decodes) >= 5, "the prompts were not cut"
    assert max(beside_decodes) < 150
    assert len(set(beside_decodes)) > 1
    for n, prompt in prompts.items():
        assert engine.answers[n] == reference_greedy(str(model_path), prompt, 16), n
    assert engine.pool.is_idle()


@pytest.mark.long  # of all layers test_combinations has the quick one
@pytest.mark.skipif(ON_GPU, reason="the runner chooses the kernels itself there")
def test_triton_kernels_answer_alike(model_path: Path, tokenizer: Any) -> None:
    """All layers of the model through Triton's interpreter: a prompt in two chunks beside decodes of another."""
    from engine.attention.triton_paged import TritonBackend

    runner = runner_of(model_path, "torch")
    assert isinstance(runner.forward, TorchForward)
    runner.forward.backend = TritonBackend()
    engine = Engine(runner, max_batch_tokens=20)
    prompts = {n: tokens_of(tokenizer, n, seed=n) for n in (6, 33)}
    for n, prompt in prompts.items():
        engine.add(n, prompt, 2)
    engine.run()
    for n, prompt in prompts.items():
        assert engine.answers[n] == reference_greedy(str(model_path), prompt, 2), n
