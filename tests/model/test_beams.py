"""A beam search finds what transformers' does: the same answers, token for token, with the same scores. Real runners,
float32, tiny models; in one engine, and over two workers with a handoff.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.gpu_check.families import Family
from benchmarks.gpu_check.models import build, make_core, make_runner, prompt_of
from engine.beams import BeamAnswer, BeamParams
from engine.types import SamplingParams, SequenceSpec
from kv_transfer.handoff import PeerId
from tests.support.moved import Two
from worker.messages import HandoffRef, LinkOutput, StartSequence

BLOCK = 8
VOCAB = 160
ENDS = (5, 17, 60, 111)
SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 32, "num_attention_heads": 2}
FAMILIES = {
    "plain": Family("plain", "LlamaConfig", SMALL, ("full",)),
    "windows": Family("windows", "Gemma2Config", SMALL | {"sliding_window": 12, "query_pre_attn_scalar": 32}, ()),
}
PLAIN, WINDOWS = FAMILIES
CPU = torch.device("cpu")
PROMPTS = [prompt_of(3 + 2 * (i % 9), VOCAB, i) for i in range(20)]
SETTINGS = [
    (BeamParams(4, 4, 1.0, False), 12),
    (BeamParams(3, 2, 0.6, True), 14),
    (BeamParams(5, 3, 1.8, "never"), 10),
]


@cache
def runner_of(family: str, which: int = 0) -> Any:
    options = {"kernels": "torch", "block_tokens": BLOCK, "max_running_sequences": 64, "max_batch_tokens": 128}
    return make_runner(CPU, FAMILIES[family], "float32", 400, threads=1, **options)[0]


@cache
def model_of(family: str) -> Any:
    return build(FAMILIES[family], CPU, torch.float32)


@cache
def reference(family: str, prompt: tuple[int, ...], beams: BeamParams, tokens: int, least: int = 0) -> list[BeamAnswer]:
    return wanted(model_of(family), prompt, beams, tokens, least)


def wanted(model: Any, prompt: tuple[int, ...], beams: BeamParams, tokens: int, least: int = 0) -> list[BeamAnswer]:
    """As transformers finds it."""
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=beams.width,
        num_return_sequences=beams.answers,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=least or None,
        eos_token_id=list(ENDS),
        pad_token_id=model.config.vocab_size - 1,
        return_dict_in_generate=True,
        output_scores=True,
    )
    answers = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        answer = row[len(prompt) :]
        end = next((i for i, token in enumerate(answer) if token in ENDS and i >= least), None)
        answers.append(BeamAnswer(tuple(answer if end is None else answer[: end + 1]), score, end is not None))
    return answers


def search(
    family: str, prompts: list[list[int]], beams: BeamParams, tokens: int, least: int = 0
) -> list[tuple[BeamAnswer, ...]]:
    """All at once."""
    core = make_core(runner_of(family), 64)
    sampling = SamplingParams(max_tokens=tokens, min_tokens=least, stop_token_ids=frozenset(ENDS))
    for i, prompt in enumerate(prompts):
        assert core.add(SequenceSpec(i, prompt, sampling, beams=beams), 0.0) is None
    answers: dict[int, tuple[BeamAnswer, ...]] = {}
    while (plan := core.schedule(0.0)) is not None:
        events = core.commit(plan, runner_of(family).execute(plan), 0.0)
        core.check()
        assert not events.tokens
        answers |= dict(events.beams)
    assert core.is_idle()
    assert core.pool.is_idle()
    return [answers[i] for i in range(len(prompts))]


def check(found: tuple[BeamAnswer, ...], expected: list[BeamAnswer]) -> None:
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.stopped for one in found] == [one.stopped for one in expected]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)


@pytest.mark.parametrize(("beams", "tokens"), SETTINGS)
def test_as_transformers(beams: BeamParams, tokens: int) -> None:
    found = search(PLAIN, PROMPTS, beams, tokens)
    for prompt, answers in zip(PROMPTS, found, strict=True):
        check(answers, reference(PLAIN, tuple(prompt), beams, tokens))


def test_ends_that_come_too_early_are_passed_over() -> None:
    found = search(PLAIN, PROMPTS[:6], BeamParams(4, 2), 9, least=5)
    for prompt, answers in zip(PROMPTS, found, strict=False):
        check(answers, reference(PLAIN, tuple(prompt), BeamParams(4, 2), 9, least=5))


def test_windows() -> None:
    prompts = [prompt_of(n, VOCAB, n) for n in (5, 16, 30)]
    found = search(WINDOWS, prompts, BeamParams(3, 3), 12)
    for prompt, answers in zip(prompts, found, strict=True):
        check(answers, reference(WINDOWS, tuple(prompt), BeamParams(3, 3), 12))


class Searches(Two):
    """The first worker computes prompts; the second pulls them, and searches."""

    def ask(self, prompts: list[list[int]], beams: BeamParams, tokens: int) -> list[tuple[BeamAnswer, ...]]:
        self.found: dict[int, tuple[BeamAnswer, ...]] = {}
        self.adopted = 0
        for i, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=tokens, stop_token_ids=frozenset(ENDS))
            alone = SamplingParams(max_tokens=max(2, tokens))  # as router/wire.py says it
            self._to(0, StartSequence(1000 + i, "", prompt, (), alone, serve_handoff_id=f"h{i}"))
            pull = HandoffRef(f"h{i}", PeerId("a", 1), "")
            self._to(1, StartSequence(i, "", prompt, (), sampling, pull=pull, beams=beams))
        while len(self.found) < len(prompts):
            self._turn()
        self.assert_nothing_left()
        assert self.adopted == len(prompts)
        return [self.found[i] for i in range(len(prompts))]

    def _hear(self, side: int, said: LinkOutput) -> None:
        assert not said.handoff_failures, said.handoff_failures
        assert not any(end.error for end in said.ends), said.ends
        self.adopted += len(said.adoptions)
        self.found |= dict(said.beams)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("beams", "tokens"), SETTINGS)
def test_as_transformers_after_a_handoff(beams: BeamParams, tokens: int, overlap: bool) -> None:
    for prompts in [PROMPTS[:4]] if overlap else [PROMPTS[:10], PROMPTS[10:]]:
        found = Searches((runner_of(PLAIN), runner_of(PLAIN, 1)), overlap=overlap).ask(prompts, beams, tokens)
        for prompt, answers in zip(prompts, found, strict=True):
            check(answers, reference(PLAIN, tuple(prompt), beams, tokens))
