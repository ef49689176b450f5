"""n answers that begin beside the first one say, token for token, what n single requests do. Real runners, float32."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.gpu_check.families import Family
from benchmarks.gpu_check.models import make_runner, prompt_of
from engine.types import SamplingParams
from kv_transfer.handoff import PeerId
from tests.support.moved import Answer, Two
from worker.messages import HandoffRef, StartSequence

PLAIN = Family("plain", "LlamaConfig", {}, ("full",))
BLOCK = 8


@cache
def runners() -> tuple[Any, Any]:
    options = {"kernels": "torch", "block_tokens": BLOCK, "max_running_sequences": 64, "max_batch_tokens": 128}
    a, b = (make_runner(torch.device("cpu"), PLAIN, "float32", 240, threads=1, **options)[0] for _ in range(2))
    return a, b


class Beside(Two):
    """The first answer runs on the second worker, which computes its prompt or pulls it; the others begin there."""

    def ask(self, starts: list[StartSequence], *, split: bool) -> list[Answer]:
        first, *others = starts
        answers = [self._start(first, split=split)]
        while not answers[0].tokens or (split and not answers[0].moved):
            self._turn()
        answers += [self._start(start) for start in others]
        while any(one.end is None for one in answers):
            self._turn()
        self.assert_nothing_left()
        return answers

    def _start(self, start: StartSequence, *, split: bool = False) -> Answer:
        leg, source = next(self._legs), next(self._legs)
        one = self._by_leg[leg] = self._by_leg[source] = Answer(start, [], leg, 1)
        pull = HandoffRef("h", PeerId("a", 1), "") if split else None
        if split:
            self._to(0, replace(start, sequence_id=source, serve_handoff_id="h"))
        self._to(1, replace(start, sequence_id=leg, pull=pull))
        return one


def request(prompt_tokens: int, i: int) -> StartSequence:
    # Of few tokens: a draw among 1,600 that are nearly alike would tell of the last bit of a logit.
    sampling = SamplingParams(max_tokens=10, temperature=0.9, top_k=12, seed=40 + i)
    return StartSequence(0, f"r{i}", prompt_of(prompt_tokens, PLAIN.vocab, seed=prompt_tokens), [], sampling)


@cache
def alone(prompt_tokens: int, i: int) -> list[int]:
    (answer,) = Two(runners()).answers({"one": request(prompt_tokens, i)}, {}).values()
    return answer.tokens


@pytest.mark.parametrize("split", [True, False], ids=["split", "local"])
@pytest.mark.parametrize(("prompt_tokens", "n"), [(45, 1), (45, 2), (45, 8), (45, 64), (40, 8), (9, 8)])
def test_they_are_n_single_requests(prompt_tokens: int, split: bool, n: int) -> None:
    """With a last block that is full, with one that is not, and with one whole block."""
    two = Beside(runners())
    answers = two.ask([request(prompt_tokens, i) for i in range(n)], split=split)
    assert [one.tokens for one in answers] == [alone(prompt_tokens, i) for i in range(n)]
    assert len({tuple(one.tokens) for one in answers}) > n // 2
    load = two.sides[1].core.load()
    shared = (prompt_tokens - 1) // BLOCK * BLOCK
    assert load.cached_tokens_total == (n - 1) * shared
    blocks = -(-prompt_tokens // BLOCK) if split else 0
    assert two.sides[1].core.pulled_bytes_total == blocks * sum(runners()[1].block_bytes_by_group)
