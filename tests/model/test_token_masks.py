"""allowed_token_ids and bad_words: what plain transformers gives with a processor of logits, whatever else is on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.overlap import InThread
from engine.runner import ModelRunner
from engine.sampler import CAUSES, NO_CHANCE, sample
from engine.speculation import SpeculationLimits
from engine.types import PlanItem, SamplingParams, StepPlan
from tests.model.test_families import saved
from tests.model.test_speculation import answers, made, prompts, tokens

STEPS = 16


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="module")
def llama(path: Path) -> ModelRunner:
    return made(path)


def reference(model: Any, prompt: list[int], allowed: Sequence[int], bad_words: Sequence[Sequence[int]]) -> list[int]:
    from transformers import LogitsProcessor, LogitsProcessorList

    class Processor(LogitsProcessor):
        """As vLLM defines them."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            answer = input_ids[0, len(prompt) :].tolist()
            if allowed:
                kept = scores[0, list(allowed)]
                scores = torch.full_like(scores, -torch.inf)
                scores[0, list(allowed)] = kept
            for word in bad_words:
                before = list(word[:-1])
                if not before or answer[-len(before) :] == before:
                    scores[0, word[-1]] = -torch.inf
            return scores

    made = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, pad_token_id=2,
        logits_processor=LogitsProcessorList([Processor()]),
    )[0].tolist()  # fmt: skip
    return made[len(prompt) :]


def bad_words_of(answer: list[int], at: int) -> tuple[tuple[int, ...], ...]:
    """What the answer says there, and in turn: each ban changes what follows."""
    return ((answer[at],), tuple(answer[at + 1 : at + 3]), tuple(answer[at + 2 : at + 6]), tuple(answer[:2]))


def test_greedy_answers_are_those_of_plain_transformers(path: Path, llama: ModelRunner) -> None:
    """In one batch, with steps that overlap, and with drafts: a random model repeats itself, so that they are many."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    asked: list[tuple[list[int], SamplingParams]] = []
    expected: list[list[int]] = []
    changed = 0
    for n, prompt in enumerate(prompts(6)):
        free = reference(model, prompt, (), ())
        allowed = tuple(range(3 + n, 128, 5)) if n % 3 != 1 else ()
        bad = bad_words_of(reference(model, prompt, allowed, ()), n % 7) if n % 3 else ()
        asked.append((prompt, SamplingParams(max_tokens=STEPS, allowed_token_ids=allowed, bad_words=bad)))
        expected.append(reference(model, prompt, allowed, bad))
        changed += expected[-1] != free
        assert not allowed or set(expected[-1]) <= set(allowed)
    assert changed == len(asked)
    asked.append((prompts(1)[0], SamplingParams(max_tokens=STEPS)))
    expected.append(reference(model, asked[-1][0], (), ()))
    for launcher in (None, InThread(llama)):
        found, _ = answers(llama, asked, None, launcher=launcher)
        assert tokens(found) == expected
        drafted, speculation = answers(llama, asked, SpeculationLimits(6), launcher=launcher)
        assert tokens(drafted) == expected
        assert speculation is not None
        assert speculation.counts.accepted > 0


def item(sampling: SamplingParams, history: list[int], prompt_len: int) -> PlanItem:
    return PlanItem(1, [0], 0, [0], True, len(history) - prompt_len, sampling, prompt_len, history)


def test_a_word_that_began_in_the_prompt_is_not_the_answers() -> None:
    logits = torch.arange(8.0)[None]
    sampling = SamplingParams(bad_words=((6, 7),))
    assert sample(logits, [item(sampling, [1, 6], 2)])[0] == [7]
    assert sample(logits, [item(sampling, [1, 6], 1)])[0] == [6]


def test_draws_keep_to_the_masks_and_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.zeros(1, 64)
    sampling = [
        SamplingParams(temperature=1.0, seed=s, allowed_token_ids=(5, 9, 11), bad_words=((9,),), logprobs=2, top_k=k)
        for s in range(20)
        for k in (0, 2, 3)
    ]
    found, logprobs = sample(logits.expand(len(sampling), -1).clone(), [item(p, [0], 1) for p in sampling])
    assert set(found) == {5, 11}
    assert all(one is not None and one.logprob == pytest.approx(-4.158883) for one in logprobs)


def test_what_leaves_no_token_fails_one_row_with_its_cause() -> None:
    logits = torch.zeros(2, 8)
    sampling = SamplingParams(allowed_token_ids=(5,), bad_words=((3, 5),))
    assert sample(logits, [item(sampling, [0, 3], 1), item(SamplingParams(), [0], 1)])[0] == [NO_CHANCE, 0]
    assert "bad words" in CAUSES[NO_CHANCE]


def test_what_leaves_no_token_is_the_requests_own_doing(llama: ModelRunner) -> None:
    wrong = SamplingParams(allowed_token_ids=(5,), bad_words=((5,),))
    for drafts in ((), (3,)):
        found = llama.execute(
            StepPlan(1, (PlanItem(1, (3, *drafts), 0, (0,), True, 0, wrong, 1, (3,), drafts=drafts),))
        )
        (failed,) = found.failures.values()
        assert not failed.ours
        assert "bad words" in failed.cause


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (SamplingParams(allowed_token_ids=(128,)), "not in the vocabulary of 128"),
        (SamplingParams(bad_words=((-1,),)), "not in the vocabulary of 128"),
        (SamplingParams(bad_words=((),)), "1 to 64 tokens"),
        (SamplingParams(bad_words=((1,) * 65,)), "1 to 64 tokens"),
        (SamplingParams(bad_words=((1,),) * 513), "limit is 512"),
        (SamplingParams(allowed_token_ids=(1,) * 4097), "limit is 4096"),
    ],
)
def test_a_worker_looks_again(params: SamplingParams, words: str) -> None:
    assert words in params.problem(128)
