"""A running answer that goes on at another worker is, token for token, what it had been: every kind of sampling, every
kind of layout, with steps that overlap and without, there and back again. Real runners, float32.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check.families import FAMILIES, Family
from benchmarks.gpu_check.models import make_runner, prompt_of
from engine.grammar import Grammar, GrammarCompiler
from engine.types import FinishReason, SamplingParams
from grammar.structured import Kind, Structured
from tests.support.checkpoints import saved_tokenizer
from tests.support.moved import Two
from worker.messages import StartSequence

PLAIN = Family("plain", "LlamaConfig", {}, ("full",))
LAYOUTS = {family.name: family for family in (PLAIN, *FAMILIES)}
QUICK = ("plain", "window, sinks, experts", "Mamba 2 beside attention")
PARAMS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in LAYOUTS]
TOKENS = 60
WORDS = Structured(Kind.REGEX, r"[a-z]{40,50}")

pytestmark = pytest.mark.timeout(240)


@cache
def runners(name: str) -> tuple[Any, Any]:
    options = {"kernels": "torch", "block_tokens": 8, "max_running_sequences": 12, "max_batch_tokens": 64, "threads": 1}
    a, b = (make_runner(torch.device("cpu"), LAYOUTS[name], "float32", 160, **options)[0] for _ in range(2))
    assert tuple(str(g.rule) for g in a.facts.groups) == LAYOUTS[name].rules
    return a, b


class Compiled:
    """The one grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar

    def find(self, structured: Structured) -> Grammar:
        return self._grammar


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    PLAIN.config().save_pretrained(path)
    saved_tokenizer(path)
    return Compiled(GrammarCompiler(str(path), PLAIN.vocab).compile(WORDS))


def requests(stop: int | None = None) -> dict[str, StartSequence]:
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        # Of few tokens: a draw among 1,600 that are nearly alike would tell of the last bit of a logit.
        "sampled": {"temperature": 0.9, "top_p": 0.9, "top_k": 12, "seed": 7},
        "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.9},
        "sampled, penalties": {"temperature": 0.8, "top_k": 12, "seed": 3, "frequency_penalty": 1.1},
        "log-probabilities": {"logprobs": 3},
        "bias": {"logit_bias": ((5, 9.0), (6, 8.5))},
        "grammar": {},
        "stop": {} if stop is None else {"stop_token_ids": frozenset([stop])},
        "masks": {
            "allowed_token_ids": tuple(range(5, 40)),
            "bad_words": ((7,), (9, 10), (5, 5, 5)),
            "temperature": 0.7,
        },
    }
    starts: dict[str, StartSequence] = {}
    for n, (name, options) in enumerate(kinds.items()):
        prompt = prompt_of((3, 17, 64, 97)[n % 4], PLAIN.vocab, seed=n)
        sampling = SamplingParams(max_tokens=TOKENS, **options)
        structured = WORDS if name == "grammar" else None
        starts[name] = StartSequence(0, name, prompt, [], sampling, structured=structured)
    return starts


@cache
def undisturbed(name: str, grammars: Any) -> tuple[int, dict[str, Any]]:
    """The token that ends "stop", and the answers."""
    first = Two(runners(name), grammars=grammars).answers({"stop": requests()["stop"]}, {})
    stop = first["stop"].tokens[45]
    return stop, Two(runners(name), grammars=grammars).answers(requests(stop), {})


@pytest.mark.parametrize("overlap", [False, True], ids=["one step after the other", "steps overlap"])
@pytest.mark.parametrize("name", PARAMS)
def test_it_is_the_answer_that_it_had_been(name: str, overlap: bool, grammars: Any) -> None:
    stop, expected = undisturbed(name, grammars)
    starts = requests(stop)
    assert expected["penalties"].tokens != expected["greedy"].tokens
    assert 20 < len(expected["stop"].tokens) <= 46
    moves = {kind: [1 + 2 * n, 20 + n] for n, kind in enumerate(starts)}
    answers = Two(runners(name), overlap=overlap, grammars=grammars).answers(starts, moves)
    for kind, one in answers.items():
        assert one.tokens == expected[kind].tokens, kind
        assert one.end == expected[kind].end, kind
        assert one.moved == 2, f"{kind} was moved {one.moved} times"
    assert answers["stop"].end is FinishReason.STOP
    theirs, ours = expected["log-probabilities"].logprobs, answers["log-probabilities"].logprobs
    assert sorted(ours) == list(range(TOKENS))
    for position, value in ours.items():
        assert value.logprob == pytest.approx(theirs[position].logprob, abs=1e-3)
        assert [t for t, _ in value.top][:1] == [t for t, _ in theirs[position].top][:1]
