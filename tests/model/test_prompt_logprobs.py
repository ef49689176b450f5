"""Log-probabilities of prompts: those of plain transformers, however the prompt is cut and whatever is computed beside
it; and what nobody asks for costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.overlap import InThread
from engine.prompt_logprobs import PromptLogprobs, rows_at_once
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.scoring import Scoring
from engine.speculation import SpeculationLimits
from engine.types import Failed, FinishReason, PlanItem, SamplingParams, SequenceSpec, StepPlan, StepResult
from tests.model.test_families import SIZE, saved
from tests.model.test_speculation import made, prompts
from worker.repeat import repeat

VOCABULARY = SIZE["vocab_size"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="module")
def llama(path: Path) -> ModelRunner:
    return made(path)


def expected(path: Path, prompt: list[int]) -> torch.Tensor:
    """[len(prompt) - 1, vocabulary]"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1], dim=-1)


class Engine:
    """`answers` and `scores` by sequence. Checks itself when nothing is left."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        batch_tokens: int = 64,
        rows: int | None = None,
        launcher: Any = None,
        drafts: bool = False,
    ) -> None:
        self.runner, self.launcher = runner, launcher
        facts = runner.facts
        limits = EngineLimits(runner.block_tokens, batch_tokens, 16, 512, facts.context_limit_tokens, facts.vocab_size)
        self.pool = BlockPool(runner.num_blocks)
        rules = [group.rule for group in facts.groups]
        self.core = EngineCore(limits, self.pool, rules=rules, speculation=SpeculationLimits(4) if drafts else None)
        if rows is not None:
            self.core._scheduler._rows_at_once = rows
        self.answers: dict[int, list[int]] = {}
        self.scores: dict[int, list[PromptLogprobs]] = {}
        self.ends: dict[int, Any] = {}
        self.most_rows = 0
        self._next = 0

    def run(self, asked: Sequence[tuple[list[int], SamplingParams]]) -> list[int]:
        numbers = range(self._next, self._next + len(asked))
        self._next += len(asked)
        for number, (prompt, sampling) in zip(numbers, asked, strict=True):
            assert self.core.add(SequenceSpec(number, prompt, sampling), 0.0) is None
            self.answers[number], self.scores[number] = [], []
        flying: list[Any] = []
        while True:
            plan = self.core.schedule(0.0)
            if plan is not None:
                scored = [len(item.token_ids) for item in plan.items if item.prompt_logprobs is not None]
                self.most_rows = max(self.most_rows, sum(scored))
                flying.append((plan, (self.launcher or self.runner).launch(plan)))
            if not flying:
                break
            if plan is not None and self.launcher is not None and len(flying) < 2:
                continue
            planned, step = flying.pop(0)
            events = self.core.commit(planned, step.wait(), 0.0)
            for number, part in events.prompt_logprobs:
                assert not self.answers[number], "they leave before the first token"
                self.scores[number].append(part)
            for token in events.tokens:
                self.answers[token.sequence_id].append(token.token_id)
            self.ends |= {end.sequence_id: end for end in events.ends}
        self.core.check()
        assert self.core.is_idle()
        assert self.pool.is_idle()
        return list(numbers)

    def compare(self, number: int, theirs: torch.Tensor, prompt: list[int], alternatives: int) -> None:
        parts = self.scores[number]
        assert [part.position for part in parts] == [1 + sum(map(len, parts[:i])) for i in range(len(parts))]
        own, ranks, ids, values = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("own", "ranks", "ids", "values")
        )
        assert len(own) == len(prompt) - 1
        at = torch.tensor(prompt[1:])[:, None]
        assert np.allclose(own, theirs.gather(-1, at)[:, 0], atol=1e-4, rtol=0)
        best = theirs.sort(dim=-1, descending=True, stable=True)
        assert ids.shape == (len(own), alternatives)
        assert np.allclose(values, best.values[:, :alternatives], atol=1e-4, rtol=0)
        clear = (best.values[:, : alternatives + 1].diff(dim=-1).abs() > 1e-5).numpy()
        same = ids == best.indices[:, :alternatives].numpy()
        assert same[
            clear[:, :alternatives] & np.pad(clear, ((0, 0), (1, 0)), constant_values=True)[:, :alternatives]
        ].all()
        apart = ((theirs - theirs.gather(-1, at)).abs() < 1e-5).sum(-1) == 1
        theirs_ranks = (theirs >= theirs.gather(-1, at)).sum(-1)
        assert np.array_equal(ranks[apart.numpy()], theirs_ranks[apart].numpy())


PROMPT = prompts(40)[-1] + prompts(8)[5] + list(range(3, 90))


@pytest.mark.parametrize(("overlap", "drafts"), [(False, False), (True, False), (False, True)])
def test_they_are_those_of_plain_transformers_beside_others(
    path: Path, llama: ModelRunner, overlap: bool, drafts: bool
) -> None:
    theirs = expected(path, PROMPT)
    engine = Engine(llama, batch_tokens=24, rows=11, launcher=InThread(llama) if overlap else None, drafts=drafts)
    others = [(prompt, SamplingParams(max_tokens=12)) for prompt in prompts(6)]
    alone = Engine(llama)
    plain = [alone.answers[n] for n in alone.run([*others, (PROMPT, SamplingParams(max_tokens=5))])]
    assert not any(alone.scores.values())
    asked = [(PROMPT, SamplingParams(max_tokens=5, prompt_logprobs=k, temperature=0.0)) for k in (0, 1, 5)]
    numbers = engine.run([*others, *asked])
    assert [engine.answers[n] for n in numbers] == [*plain, plain[-1], plain[-1]]
    assert engine.most_rows <= 11
    for k, number in zip((0, 1, 5), numbers[-3:], strict=True):
        engine.compare(number, theirs, PROMPT, k)


def test_what_the_prefix_cache_has_is_computed_again(path: Path, llama: ModelRunner) -> None:
    theirs = expected(path, PROMPT)
    engine = Engine(llama)
    first, second = engine.run([(PROMPT, SamplingParams(max_tokens=2))]) + engine.run(
        [(PROMPT, SamplingParams(max_tokens=2, prompt_logprobs=3))]
    )
    assert engine.ends[second].cached_tokens == 0
    assert engine.answers[first] == engine.answers[second]
    engine.compare(second, theirs, PROMPT, 3)
    third = engine.run([(PROMPT, SamplingParams(max_tokens=2))])[0]
    assert engine.ends[third].cached_tokens > len(PROMPT) - 2 * llama.block_tokens


@pytest.mark.parametrize(
    ("family", "settings", "changes"),
    [
        ("Llama", {"kernels": "torch"}, {}),
        ("Llama", {"batch_invariant": True}, {}),
        ("Gemma2", {}, {"sliding_window": 16, "head_dim": 16, "final_logit_softcapping": 5.0}),
        ("Granite", {}, {"logits_scaling": 3.0}),
    ],
)  # fmt: skip
def test_every_path_and_kind_of_head(
    tmp_path: Path, family: str, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    saved(tmp_path, family, **changes)
    prompt = PROMPT[-60:]
    theirs = expected(tmp_path, prompt)
    engine = Engine(made(tmp_path, **settings), batch_tokens=24, rows=9)
    engine.compare(engine.run([(prompt, SamplingParams(max_tokens=3, prompt_logprobs=4))])[0], theirs, prompt, 4)


@pytest.mark.parametrize("settings", [{"kernels": "torch"}, {"kernels": "torch", "kv_dtype": "int8"}, {}])
def test_one_token_of_a_prompt_beside_other_prompts(path: Path, settings: dict[str, Any]) -> None:
    """A chunk of one token is a decode to who attends, so it stands before prompts."""
    runner = made(path, **settings)

    def item(number: int, first: int, end: int, wanted: int | None) -> PlanItem:
        blocks = (2 * number, 2 * number + 1)
        sampling = SamplingParams(prompt_logprobs=wanted)
        own = PROMPT[number : number + 12]
        tokens = own[first:end]
        return PlanItem(number, tokens, first, blocks, end == 12, 0, sampling, 12, own, prompt_logprobs=wanted)

    def score(*items: PlanItem) -> StepResult:
        return runner.execute(StepPlan(1, items))

    begin, one = item(1, 0, 7, 3), item(1, 7, 8, 3)
    score(begin)
    alone = score(one).prompt_logprobs[0]
    beside = score(item(2, 0, 12, None), item(3, 0, 9, None), one)
    assert np.allclose(beside.prompt_logprobs[2].own, alone.own, atol=1e-5)
    assert np.allclose(beside.prompt_logprobs[2].values, alone.values, atol=1e-5)
    assert beside.token_ids[0] == score(item(2, 0, 12, None)).token_ids[0]
    if "kv_dtype" not in settings:
        theirs = expected(path, PROMPT[1:13])
        assert np.allclose(beside.prompt_logprobs[2].own, theirs[7, PROMPT[9]], atol=1e-4)


def test_without_a_token_only_the_prompt_is_computed(path: Path, llama: ModelRunner) -> None:
    """As long as the context, too."""
    longest = (PROMPT * 3)[: SIZE["max_position_embeddings"]]
    engine = Engine(llama)
    asked = [(p, SamplingParams(max_tokens=0, prompt_logprobs=1)) for p in (PROMPT, longest, [5])]
    for number, (prompt, _) in zip(engine.run(asked), asked, strict=True):
        assert engine.answers[number] == []
        assert engine.ends[number].reason is FinishReason.LENGTH
        if len(prompt) > 1:
            engine.compare(number, expected(path, prompt), prompt, 1)
        else:
            assert engine.scores[number] == []
    refused = engine.core.add(SequenceSpec(99, [*longest, 3], SamplingParams(max_tokens=0)), 0.0)
    assert refused is not None
    assert "context limit" in refused.reason


def test_a_prompt_that_lost_its_blocks_says_it_all_again_and_not_after_its_first_token(path: Path) -> None:
    """Two prompts that do not fit together: the later one gives way, and is computed again."""
    runner = made(path, num_blocks=26)
    prompt, other = PROMPT[:70], PROMPT[10:80]
    engine = Engine(runner, batch_tokens=24)
    sampling = SamplingParams(max_tokens=60, prompt_logprobs=2)
    numbers = engine.run([(prompt, sampling), (other, sampling)])
    assert engine.core.load().preemptions_total > 0
    for number, own in zip(numbers, (prompt, other), strict=True):
        engine.compare(number, expected(path, own), own, 2)
        assert len(engine.answers[number]) == 60


def test_a_step_that_is_repeated_in_parts_gives_them(path: Path, llama: ModelRunner) -> None:
    def item(number: int, block: int, wanted: int | None) -> PlanItem:
        sampling = SamplingParams(prompt_logprobs=wanted)
        return PlanItem(number, PROMPT[:8], 0, (block,), True, 0, sampling, 8, PROMPT[:8], prompt_logprobs=wanted)

    plan = StepPlan(1, (item(1, 0, None), item(2, 1, 2), item(3, 2, 1)))
    whole = llama.execute(plan)
    parts = repeat(plan, RuntimeError("planted"), llama.execute, [True, True, True])
    assert whole.prompt_logprobs.keys() == parts.prompt_logprobs.keys() == {1, 2}
    for place, found in whole.prompt_logprobs.items():
        assert np.allclose(found.own, parts.prompt_logprobs[place].own, atol=1e-5)
        assert found.position == parts.prompt_logprobs[place].position == 1


def test_logits_that_are_no_numbers_fail_their_prompt_alone() -> None:
    sampling = SamplingParams(prompt_logprobs=1)
    items = [PlanItem(n, [3, 4, 5], 0, (n,), True, 0, sampling, 3, [3, 4, 5], prompt_logprobs=1) for n in range(2)]
    scoring = Scoring.of(items, [1, 0], [2, 5])
    assert scoring is not None
    assert scoring.rows == [0, 1, 3, 4]
    logits = torch.zeros(6, 8)
    logits[5, 2] = torch.nan
    assert torch.equal(scoring.launch(logits), logits[:2])
    found, failed = scoring.read()
    assert list(found) == [1]
    assert isinstance(failed[0], Failed)
    assert "position 2 of the prompt" in failed[0].cause


def test_a_steps_logits_stay_small_whatever_the_vocabulary() -> None:
    for vocabulary in (128, 49152, 151936, 262144):
        assert rows_at_once(vocabulary) * vocabulary * 4 <= 64 << 20
    assert rows_at_once(262144) >= 64
