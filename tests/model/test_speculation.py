"""Speculation changes no token: 200 greedy and 200 sampled answers on a tiny model, and each kind of layers.

A random model falls into repetitions soon, so that lookup finds drafts and many of them are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.grammar import GrammarCompiler
from engine.model_loader import ModelLoadError
from engine.overlap import InThread
from engine.runner import ModelRunner
from engine.sampler import Sampler, sample
from engine.scheduler import EngineLimits
from engine.speculation import Speculation, SpeculationLimits
from engine.types import PlanItem, SamplingParams, SequenceSpec
from engine.verify import Verification
from grammar.structured import Kind, Structured
from kv_transfer.handoff import TokenLogprobs
from tests.model.test_families import saved
from tests.support.prompts import tokens_of
from tests.support.runners import started
from tests.support.tiers import tiered

BLOCK = 8
Answer = list[tuple[int, TokenLogprobs | None]]


def made(path: Path, **settings: Any) -> ModelRunner:
    own = {"model": str(path), "dtype": "float32", "num_blocks": 256, "block_tokens": BLOCK, "threads": 1}
    return started(own | settings)


def answers(
    runner: ModelRunner,
    asked: Sequence[tuple[list[int], SamplingParams]],
    speculation: SpeculationLimits | None,
    *,
    launcher: Any = None,
    matchers: Sequence[Any] = (),
) -> tuple[list[Answer], Speculation | None]:
    facts = runner.facts
    limits = EngineLimits(runner.block_tokens, 64, 16, 512, facts.context_limit_tokens, facts.vocab_size)
    pool = BlockPool(runner.num_blocks)
    rules = [group.rule for group in facts.groups]
    core = EngineCore(limits, pool, rules=rules, speculation=speculation)
    found: list[Answer] = [[] for _ in asked]
    for number, (prompt, sampling) in enumerate(asked):
        matcher = matchers[number] if matchers else None
        assert core.add(SequenceSpec(number, prompt, sampling, matcher=matcher), 0.0) is None
    flying: list[Any] = []
    while True:
        plan = core.schedule(0.0)
        if plan is not None:
            flying.append((plan, (launcher or runner).launch(plan)))
        if not flying:
            break
        if plan is not None and launcher is not None and len(flying) < 2:
            continue
        planned, step = flying.pop(0)
        events = core.commit(planned, step.wait(), 0.0)
        assert not [end for end in events.ends if end.error]
        for token in events.tokens:
            assert token.position == len(found[token.sequence_id])
            found[token.sequence_id].append((token.token_id, token.logprobs))
    core.check()
    assert core.is_idle()
    assert pool.is_idle()
    return found, core.speculation


def tokens(found: list[Answer]) -> list[list[int]]:
    return [[token for token, _ in answer] for answer in found]


def prompts(count: int, vocabulary: int = 128) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(2, 30, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return made(saved(tmp_path_factory.mktemp("llama"), "Llama"))


def test_200_greedy_answers(llama: ModelRunner) -> None:
    asked = [(p, SamplingParams(max_tokens=24)) for p in prompts(200)]
    plain, _ = answers(llama, asked, None)
    drafted, speculation = answers(llama, asked, SpeculationLimits(6))
    assert tokens(drafted) == tokens(plain)
    assert speculation is not None
    assert speculation.counts.accepted > 200


def sampled(count: int) -> list[tuple[list[int], SamplingParams]]:
    """All that may shape a draw, in turns."""
    kinds: list[dict[str, Any]] = [
        {},
        {"top_k": 5},
        {"top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.4, "frequency_penalty": -0.3},
        {"logprobs": 3},
        {"logit_bias": ((5, 4.0), (9, -100.0))},
        {"min_tokens": 6, "stop_token_ids": frozenset(range(40))},
    ]
    return [
        (p, SamplingParams(**({"temperature": 0.15 + i % 3 / 10, "seed": i, "max_tokens": 20} | kinds[i % len(kinds)])))
        for i, p in enumerate(prompts(count))
    ]


def test_200_sampled_answers(llama: ModelRunner) -> None:
    asked = sampled(200)
    plain, _ = answers(llama, asked, None)
    drafted, speculation = answers(llama, asked, SpeculationLimits(6))
    assert tokens(drafted) == tokens(plain)
    for one, other in zip(plain, drafted, strict=True):
        for (_, expected), (_, found) in zip(one, other, strict=True):
            assert (expected is None) == (found is None)
            if expected is not None and found is not None:
                assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
                assert [t for t, _ in found.top] == [t for t, _ in expected.top]
    assert speculation is not None
    assert speculation.counts.accepted > 100


def test_overlapping_steps(llama: ModelRunner) -> None:
    asked = sampled(24)
    plain, _ = answers(llama, asked, None)
    drafted, speculation = answers(llama, asked, SpeculationLimits(6), launcher=InThread(llama))
    assert tokens(drafted) == tokens(plain)
    assert speculation is not None
    assert speculation.counts.accepted > 0


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Mistral", {"sliding_window": 12}),
        *tiered(
            [("Gemma2", {"sliding_window": 12, "head_dim": 16})],
            [
                ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}),
                ("Phi3", {"rope_scaling": None}),
            ],
        ),
    ],
)
def test_windows_and_other_layers(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    runner = made(saved(tmp_path, family, **changes))
    asked = sampled(16)
    plain, _ = answers(runner, asked, None)
    drafted, _ = answers(runner, asked, SpeculationLimits(5))
    assert tokens(drafted) == tokens(plain)


def test_batch_invariant_mode_is_exact_to_the_last_bit(tmp_path: Path) -> None:
    runner = made(saved(tmp_path, "Llama"), batch_invariant=True)
    asked = [(p, SamplingParams(max_tokens=16, logprobs=5)) for p in prompts(6)]
    plain, _ = answers(runner, asked, None)
    drafted, speculation = answers(runner, asked, SpeculationLimits(5))
    assert drafted == plain
    assert speculation is not None
    assert speculation.counts.accepted > 0


def test_recurrent_layers_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, "Mamba2", num_heads=8, head_dim=16, state_size=16, n_groups=2, expand=2)
    with pytest.raises(ModelLoadError, match=r"set engine\.speculation\.method to off"):
        ModelRunner(EngineConfig.model_validate({"model": str(path), "speculation": {"method": "lookup"}}))


@pytest.mark.parametrize("seed", range(8))
def test_a_verification_is_one_step_after_the_other(seed: int) -> None:
    """Of given logits: each item gives what a sampler gives that sees its rows one at a time."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, items, rows, expected = 12, [], [], []
    for i in range(6):
        count = int(torch.randint(0, 5, (1,), generator=generator))
        logits = torch.randn((1 + count, vocabulary), generator=generator) * 3
        sampling = SamplingParams(
            temperature=float(i % 2), seed=i, repetition_penalty=1.5 if i % 3 == 0 else 1.0, logprobs=i % 2 or None
        )
        history, said = [1, 2, 3], []
        drafts: list[int] = []
        for row in range(1 + count):
            item = PlanItem(i, [0], 2, [0], True, row, sampling, 2, [*history, *drafts])
            token, logprobs = (found[0] for found in sample(logits[row : row + 1].clone(), [item]))
            said.append((token, logprobs))
            if row < count:
                drafts.append(token if torch.rand(1, generator=generator) < 0.7 else (token + 1) % vocabulary)
                if drafts[-1] != token:
                    drafts += [0] * (count - row - 1)
                    break
        items.append(PlanItem(i, [3, *drafts], 2, [0], True, 0, sampling, 2, history, drafts=drafts))
        rows.append(logits)
        expected.append(said)
    found = Verification(Sampler(vocabulary), torch.cat(rows), items).read()
    assert tokens(found) == tokens(expected)
    for one, other in zip(found, expected, strict=True):
        assert [p is None for _, p in one] == [p is None for _, p in other]


def test_a_position_without_a_token_is_left_to_its_own_step() -> None:
    logits = torch.zeros((3, 4))
    logits[0, 2], logits[1, 1], logits[2] = 5.0, 5.0, torch.nan
    item = PlanItem(1, [3, 2, 1], 2, [0], True, 0, SamplingParams(), 2, [1, 2, 3], drafts=[2, 1])
    assert tokens(Verification(Sampler(4), logits, [item]).read()) == [[2, 1]]


@pytest.fixture(scope="module")
def embedded(model_path: Path) -> ModelRunner:
    return made(model_path, block_tokens=32)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", tiered([4], [50]))
def test_the_embedded_model(embedded: ModelRunner, tokenizer: Any, count: int) -> None:
    """Words in any order, twice: then it goes on with the same."""
    texts = [tokens_of(tokenizer, 12 + n % 20, seed=n) * 2 for n in range(count)]
    asked = [(text, SamplingParams(max_tokens=24)) for text in texts]
    asked += [(text, SamplingParams(max_tokens=24, temperature=0.7, seed=n)) for n, text in enumerate(texts)]
    plain, _ = answers(embedded, asked, None)
    drafted, speculation = answers(embedded, asked, SpeculationLimits(7))
    assert tokens(drafted) == tokens(plain)
    assert speculation is not None
    assert speculation.counts.accepted > 0


def test_grammars(embedded: ModelRunner, model_path: Path, tokenizer: Any) -> None:
    runner = embedded
    compiler = GrammarCompiler(str(model_path), runner.facts.vocab_size)
    schema = '{"type":"array","items":{"type":"string","maxLength":6},"minItems":5,"maxItems":5}'
    grammar = compiler.compile(Structured(Kind.JSON_SCHEMA, schema))
    found = []
    for speculation in (None, SpeculationLimits(4)):
        samplings = [SamplingParams(max_tokens=40, temperature=0.5 * i, seed=i) for i in (0, 1)]
        asked = [(tokens_of(tokenizer, 20, seed=i), sampling) for i, sampling in enumerate(samplings)]
        answered, counted = answers(runner, asked, speculation, matchers=[grammar.start(), grammar.start()])
        found.append(tokens(answered))
    assert found[0] == found[1]
    assert counted is not None
    assert counted.counts.verified > 0
