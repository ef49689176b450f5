"""How far bfloat16 logits lie from float32's: a bound, per backend (docs/reliability.md, "Exactness").

The reference is plain transformers in float32 over the same bfloat16 weights, fed the tokens that the engine chose.
Errors are in units of the reference logits' own spread (their standard deviation over the vocabulary). Rounding weights
and activations to eight bits costs any engine something: plain transformers in bfloat16 is measured beside ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.sampler import Drawn
from engine.scheduler import EngineLimits
from engine.types import PlanItem, SamplingParams, SequenceSpec
from tests.support.prompts import reference_model, tokens_of
from tests.support.runners import started
from tests.support.tiers import tiered

# Of any sampled token's logits: root mean square, and the largest. The native stack keeps float32 between products.
NATIVE_BOUNDS, TORCH_BOUNDS = (0.06, 0.25), (0.12, 0.5)
BESIDE_TRANSFORMERS = 1.5  # mean over tokens of the root mean squares, against transformers' own in bfloat16
LENGTHS = (5, 75, 290)
NEW_TOKENS = 5


class Recorder:
    """Greedy, and keeps the logits."""

    def __init__(self) -> None:
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.tokens: dict[int, list[int]] = {}

    def draw(self, logits: torch.Tensor, items: Sequence[PlanItem]) -> Drawn:
        chosen = logits.argmax(dim=-1).tolist()
        for row, item, token in zip(logits, items, chosen, strict=True):
            self.logits.setdefault(item.sequence_id, []).append(row.float().clone())
            self.tokens.setdefault(item.sequence_id, []).append(token)
        return Drawn(len(items), torch.tensor(chosen), None)


@lru_cache(maxsize=1)
def bfloat16_model(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize(
    "settings",
    tiered([{}], [{"kernels": "torch"}, {"kernels": "torch", "batch_invariant": True}]),
    ids=["what the machine chooses", "torch", "torch, batch-invariant"],
)
def test_logits_are_near_float32(settings: dict[str, Any], model_path: Path, tokenizer: Any) -> None:
    config = {"model": str(model_path), "dtype": "bfloat16", "num_blocks": 100, "threads": 1, **settings}
    runner = started(config)
    recorder = Recorder()
    runner._sampler = recorder  # type: ignore[assignment]
    # Chunks of 128: prompts are cut, and decode beside one another's chunks.
    core = EngineCore(EngineLimits(32, 128, 16, 16, 8192, runner.facts.vocab_size), BlockPool(runner.num_blocks))
    prompts = {length: tokens_of(tokenizer, length, seed=length) for length in LENGTHS}
    for number, prompt in prompts.items():
        assert core.add(SequenceSpec(number, prompt, SamplingParams(max_tokens=NEW_TOKENS)), 0.0) is None
    while (plan := core.schedule(0.0)) is not None:
        core.commit(plan, runner.execute(plan), 0.0)

    exact = reference_model(str(model_path))
    rounded = bfloat16_model(str(model_path))
    errors, plain_errors = [], []
    for number, prompt in prompts.items():
        known = torch.tensor([prompt + recorder.tokens[number][:-1]])
        with torch.inference_mode():
            expected = exact(input_ids=known).logits[0, len(prompt) - 1 :]
            plain = rounded(input_ids=known).logits[0, len(prompt) - 1 :].float()
        spread = expected.std(dim=-1, keepdim=True)
        errors.append((torch.stack(recorder.logits[number]) - expected) / spread)
        plain_errors.append((plain - expected) / spread)
    error, plain_error = torch.cat(errors), torch.cat(plain_errors)
    assert error.shape == (len(LENGTHS) * NEW_TOKENS, runner.facts.vocab_size)
    rms, plain_rms = (e.square().mean(dim=-1).sqrt() for e in (error, plain_error))
    rms_bound, worst_bound = NATIVE_BOUNDS if runner.forward.name.startswith("native stack") else TORCH_BOUNDS
    assert rms.max() < rms_bound
    assert error.abs().max() < worst_bound
    assert rms.mean() < BESIDE_TRANSFORMERS * plain_rms.mean()
    print(f"rms mean {rms.mean():.4f} max {rms.max():.4f}, largest {error.abs().max():.3f};", end=" ")
    print(f"transformers: mean {plain_rms.mean():.4f} max {plain_rms.max():.4f}, largest {plain_error.abs().max():.3f}")
