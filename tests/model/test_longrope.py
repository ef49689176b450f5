"""Models with two rotary tables (Phi-3.5, Phi-4-mini, Phi-3.5-MoE), around their original context: token for token what
transformers generates for each sequence alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import model_loader
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.longrope import original_context
from engine.model_loader import ModelLoadError
from engine.runner import LaunchedStep, ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec, StepPlan
from tests.support.courses import BLOCK, BLOCKS, Course, differences, generated
from tests.support.families import CONTEXT, VOCABULARY, longrope, saved_family
from tests.support.tiers import tiered

ORIGINAL = 32
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": longrope(ORIGINAL),
    "phimoe": longrope(ORIGINAL, short_mscale=1.1, long_mscale=1.3),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length + seed)).tolist()


def loaded(path: Path, **settings: Any) -> ModelRunner:
    fields = {"num_blocks": BLOCKS, "block_tokens": BLOCK, "threads": 1, "dtype": "float32", **settings}
    return ModelRunner(EngineConfig.model_validate({"model": str(path), **fields}))


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_family(tmp_path_factory.mktemp(request.param), request.param, FAMILIES[request.param])


@pytest.fixture(scope="module")
def runner(path: Path) -> ModelRunner:
    made = loaded(path)
    assert made.facts.original_context_tokens == ORIGINAL
    return made


@pytest.fixture(scope="module")
def plain(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


class Engine:
    """With steps that overlap, if wanted."""

    def __init__(self, runner: ModelRunner, num_blocks: int = BLOCKS) -> None:
        self.runner = runner
        self.pool = BlockPool(num_blocks)
        facts = runner.facts
        limits = EngineLimits(
            BLOCK, 20, 8, 16, facts.context_limit_tokens, facts.vocab_size,
            original_context_tokens=facts.original_context_tokens,
        )  # fmt: skip
        self.core = EngineCore(limits, self.pool)
        self.answers: dict[int, list[int]] = {}

    def add(self, number: int, tokens: Sequence[int], count: int, **options: Any) -> None:
        spec = SequenceSpec(number, list(tokens), SamplingParams(max_tokens=count), **options)
        assert self.core.add(spec, 0.0) is None
        self.answers[number] = []

    def run(self, *, ahead: bool = False) -> None:
        flying: list[tuple[StepPlan, LaunchedStep]] = []
        while True:
            plan = self.core.schedule(0.0)
            if plan is not None:
                flying.append((plan, self.runner.launch(plan)))
            if not flying:
                break
            if plan is None or len(flying) > ahead:
                oldest, step = flying.pop(0)
                for token in self.core.commit(oldest, step.wait(), 0.0).tokens:
                    self.answers[token.sequence_id].append(token.token_id)
                self.core.check()


def test_below_at_across_and_beyond_together_then_a_second_turn(runner: ModelRunner, plain: Any) -> None:
    course = Course(runner)
    prompts = [prompt(n) for n in (6, 25, 30, 31, 32, 33, 40, 70)]
    answers = course.ask(prompts, 8)
    course.ask([p + a + prompt(5) for p, a in zip(prompts, answers, strict=True)], 8)
    assert differences(course, plain) == []
    assert course.cached_tokens > 0


def test_a_long_prompt_finds_no_block_of_a_short_one_that_begins_alike(runner: ModelRunner, plain: Any) -> None:
    course = Course(runner)
    whole = prompt(60)
    course.ask([whole[:24]], 2)
    course.ask([whole], 4)
    assert course.cached_tokens == 0
    course.ask([whole[:50], whole[:20]], 4)
    assert course.cached_tokens == 48 + 16
    assert differences(course, plain) == []


@pytest.mark.parametrize("ahead", [False, True])
def test_overlapping_steps(runner: ModelRunner, plain: Any, ahead: bool) -> None:
    engine = Engine(runner)
    lengths = (22, 29, 32, 45)
    for n in lengths:
        engine.add(n, prompt(n, 1), 10)
    engine.run(ahead=ahead)
    for n in lengths:
        assert engine.answers[n] == generated(plain, prompt(n, 1), 10), n


def test_preempted(runner: ModelRunner, plain: Any) -> None:
    engine = Engine(runner, num_blocks=11)
    lengths = (29, 30, 31)
    for n in lengths:
        engine.add(n, prompt(n, 2), 20)
    engine.run()
    assert engine.core.load().preemptions_total > 0
    for n in lengths:
        assert engine.answers[n] == generated(plain, prompt(n, 2), 20), n
    assert engine.pool.is_idle()


@pytest.mark.parametrize("length", [26, 31, 32, 33])
def test_handed_over(runner: ModelRunner, plain: Any, length: int) -> None:
    """A prompt of the whole original context arrives as a short one, and its first token makes it a long one."""
    engine = Engine(runner)
    engine.add(1, prompt(length), 8, hand_over=True, retain=True)
    engine.run()
    engine.add(2, prompt(length), 8, hold=True, cache_salt="another worker")
    room = engine.core.reserve(2, length, 0.0)
    assert room is not None
    for source, target in zip(engine.core.block_table(1), room.block_ids, strict=True):
        runner.kv[target] = runner.kv[source]  # type: ignore[index]
    engine.answers[2] = list(engine.answers[1])
    engine.core.adopt(2, length, engine.answers[1], 0.0)
    engine.run()
    assert engine.answers[2] == generated(plain, prompt(length), 8)
    engine.core.drop(1)
    assert engine.pool.is_idle()


def test_within_the_original_context_there_is_one_table(path: Path) -> None:
    assert loaded(path, context_limit_tokens=ORIGINAL).facts.original_context_tokens == 0


@pytest.mark.parametrize("family", tiered(["llama"], ["phi4_multimodal"]))
def test_a_family_that_does_not_begin_anew_is_served_up_to_the_change(tmp_path: Path, family: str) -> None:
    """Llama's later keys stand beside earlier ones of the other table: what is right depends on where the prompt ends.
    Phi-4-multimodal drops its cache, and computes one token behind nothing.
    """
    path = saved_family(tmp_path, family, {**longrope(ORIGINAL), "head_dim": 16})
    with pytest.raises(ModelLoadError, match=f"set engine.context_limit_tokens to at most {ORIGINAL}$"):
        loaded(path)
    assert loaded(path, context_limit_tokens=ORIGINAL).facts.original_context_tokens == 0


@pytest.mark.parametrize("off", [-1, 1])
def test_a_cache_that_is_dropped_elsewhere_than_tables_change_is_no_such_model(path: Path, off: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(path)
    assert original_context(model, CONTEXT) == ORIGINAL
    model.config.original_max_position_embeddings += off
    assert original_context(model, CONTEXT) == 0


def test_tables_by_the_batch_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers has them."""
    monkeypatch.setattr(model_loader, "original_context", lambda *_: 0)
    with pytest.raises(
        ModelLoadError, match=f"computed wrongly.*set engine.context_limit_tokens to at most {ORIGINAL}"
    ):
        loaded(path)
