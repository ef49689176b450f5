"""A course of requests through an engine, and what transformers' own `generate` answers to each.

The prompts are of up to three windows, batched and cut in chunks. Then come one that begins as another did (a prefix
hit) and second turns of two that have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec
from tests.support.families import CONTEXT, VOCABULARY, WINDOW
from tests.support.prompts import clear_choice

BLOCK, BLOCKS = 8, 64
_CHUNK = 20


class Course:
    """`asked`: each prompt with its answer, in the order of requests."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._pool = BlockPool(runner.num_blocks)
        facts = runner.facts
        limits = EngineLimits(
            BLOCK, _CHUNK, 8, 8, facts.context_limit_tokens, facts.vocab_size,
            original_context_tokens=facts.original_context_tokens,
        )  # fmt: skip
        self._core = EngineCore(limits, self._pool, rules=[group.rule for group in runner.facts.groups])
        self.asked: list[tuple[list[int], list[int]]] = []
        self.cached_tokens = 0  # of prompts that were looked up instead of computed

    def ask(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """All at once; returns their answers."""
        first = len(self.asked)
        for number, prompt in enumerate(prompts, first):
            assert self._core.add(SequenceSpec(number, list(prompt), SamplingParams(max_tokens=count)), 0.0) is None
            self.asked.append((list(prompt), []))
        begun: set[int] = set()
        while (plan := self._core.schedule(0.0)) is not None:
            self.cached_tokens += sum(item.start for item in plan.items if item.sequence_id not in begun)
            begun.update(item.sequence_id for item in plan.items)
            for token in self._core.commit(plan, self._runner.execute(plan), 0.0).tokens:
                self.asked[token.sequence_id][1].append(token.token_id)
            self._core.check()
        assert self._core.is_idle()
        assert self._pool.is_idle()
        return [answer for _, answer in self.asked[first:]]


def run_course(runner: ModelRunner, count: int = 4) -> Course:
    def prompt(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()

    course = Course(runner)
    lengths = [n for n in (5, WINDOW, 2 * WINDOW + 1, 3 * WINDOW) if n + count <= runner.facts.context_limit_tokens]
    prompts = [prompt(n) for n in lengths]
    answers = course.ask(prompts, count)
    if runner.facts.context_limit_tokens == CONTEXT:
        turns = [prompts[i] + answers[i] + prompt(9) for i in (1, 2)]
        course.ask([prompts[-1][: 2 * WINDOW] + prompt(6), *turns], count)
    return course


def generated(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """transformers' own greedy answer, with its cache, past any end token."""
    ids = torch.tensor([list(tokens)])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            eos_token_id=None,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return [clear_choice(row[0]) for row in out.logits]


def differences(course: Course, model: Any) -> list[str]:
    """Answers that are not transformers'."""
    found = []
    for prompt, answer in course.asked:
        expected = generated(model, prompt, len(answer))
        # Some stop at their end token, whatever they are told.
        if not expected or answer[: len(expected)] != expected:
            found.append(f"{len(prompt)} tokens: {answer} where transformers has {expected}")
    return found


def answer_alone(runner: ModelRunner, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """Of one request, and nothing beside it."""
    limits = EngineLimits(BLOCK, _CHUNK, 8, 8, CONTEXT, runner.facts.vocab_size)
    core = EngineCore(limits, BlockPool(runner.num_blocks), rules=[group.rule for group in runner.facts.groups])
    assert core.add(SequenceSpec(1, list(prompt), params), 0.0) is None
    tokens: list[int] = []
    while (plan := core.schedule(0.0)) is not None:
        tokens += [token.token_id for token in core.commit(plan, runner.execute(plan), 0.0).tokens]
    return tokens
