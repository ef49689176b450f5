"""Windows, soft caps and sinks of real families, on native attention and on gather: exact beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.attention.interface import ExtrasUsed
from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from kv_transfer.layout import FULL, Rule
from tests.model.test_families import greedy, saved
from tests.model.test_latent import answered, started

WINDOW = Rule(window=16)
FAMILIES: dict[str, tuple[dict[str, Any], set[Rule], ExtrasUsed]] = {
    "Mistral": ({"sliding_window": 16}, {WINDOW}, ExtrasUsed()),
    "Gemma2": (
        {"sliding_window": 16, "head_dim": 20, "attn_logit_softcapping": 2.0, "initializer_range": 0.2},
        {FULL, WINDOW},
        ExtrasUsed(softcap=True),
    ),
    "GptOss": (
        {
            "sliding_window": 16,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "initializer_range": 0.2,
        },
        {FULL, WINDOW},
        ExtrasUsed(sinks=True),
    ),
}


@pytest.mark.parametrize("kernels", ["native", "torch", "batch-invariant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_and_extras_of_families_are_exact(tmp_path: Path, family: str, kernels: str) -> None:
    changes, rules, extras = FAMILIES[family]
    path = saved(tmp_path, family, **changes)
    invariant = kernels == "batch-invariant"
    runner = started(path, kernels="auto" if invariant else kernels, batch_invariant=invariant)
    assert {group.rule for group in runner.facts.groups} == rules
    assert runner.facts.extras == extras
    assert ("native paged" if kernels == "native" else kernels) in runner.forward.name
    limits = EngineLimits(8, 24, 8, 8, runner.facts.context_limit_tokens, runner.facts.vocab_size)
    rules = [group.rule for group in runner.facts.groups]
    core = EngineCore(limits, BlockPool(runner.num_blocks), rules=rules)
    prompts = {1: [(7 * i) % 90 + 3 for i in range(45)], 2: [5, 9, 11]}
    answers = answered(runner, core, prompts)
    for n, prompt in prompts.items():
        assert answers[n][0] == greedy(path, prompt, len(answers[n][0]))
