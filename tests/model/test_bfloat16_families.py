"""How far bfloat16 logits lie from float32's in each family that people serve, beside transformers' own in bfloat16.

All three have the same weights, rounded to bfloat16, so that only arithmetic differs. The engine computes prompts of
two windows in chunks, beside one another's decodes; of every token that it computes the logits are kept. transformers
gets the tokens that the engine chose, in one pass. A row's error is the root mean square over the vocabulary, in units
of the reference logits' spread; it is taken over the rows of prompts, and over those of decodes.

Rounding may lead a token to other experts, which says nothing of how much is rounded: a sequence counts up to the first
token that not all three lead to the same experts, in every layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.experts.parts import experts_of
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import PlanItem, SamplingParams, SequenceSpec
from tests.support.courses import BLOCK, BLOCKS
from tests.support.families import BUILT, CONTEXT, PEOPLE_SERVE, VOCABULARY, WINDOW, longrope, saved_family

BESIDE_TRANSFORMERS = 1.5
LENGTHS = range(2 * WINDOW - 6, 2 * WINDOW + 6)
NEW_TOKENS = 6
CHUNK = 20
FEWEST, FEWEST_DECODES = 150, 12  # rows that count, of 378 and 60
QUICK = ("gemma3_text", "qwen3_moe")
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v32": {"index_topk": CONTEXT},  # else no more than 16 tokens are served
    # All prompts longer than the original context: none is computed twice.
    "phi3": longrope(LENGTHS.start - 1),
    "phimoe": {},  # sharper attention leaves too few rows that all lead to the same experts
}
# Queries are made so many times larger that attention decides as sharply as in trained models: where it is nearly even,
# scores may be rounded to anything. Those of Gemma 4 are large, as nothing divides its scores.
SHARPER = {"gemma4_text": 2}
_SHARPER = 8
_QUERIES = re.compile(r"\.(q_norm|q_layernorm|query_layernorm|q_proj|q_b_proj|qkv_proj)\.weight$")


class Watched:
    """A forward pass that keeps what it computes of every token: logits, and the experts that were chosen."""

    def __init__(self, runner: ModelRunner) -> None:
        self._own = runner.forward
        self._routes = Routes(getattr(self._own, "model", None))
        self.items: Sequence[PlanItem] = ()  # of the step to come
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.chosen: dict[int, list[torch.Tensor]] = {}

    def forward(self, kv: Any, tokens: list[int], positions: Any, chunks: Any, keep: Any, *more: Any) -> torch.Tensor:
        logits = self._own.forward(kv, tokens, positions, chunks, list(range(len(tokens))), *more)
        chosen = self._routes.taken(len(tokens))
        for chunk in chunks:
            (item,) = [i for i in self.items if (i.start, list(i.block_ids)) == (chunk.start, chunk.block_ids)]
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
            self.logits.setdefault(item.sequence_id, []).append(logits[rows].float().cpu())
            self.chosen.setdefault(item.sequence_id, []).append(chosen[rows])
        return logits[list(keep)]


class Routes:
    """The experts that each row is led to, as they are called."""

    def __init__(self, model: Any) -> None:
        self._seen: list[torch.Tensor] = []
        for experts in experts_of(model) if isinstance(model, torch.nn.Module) else ():
            experts.module.register_forward_pre_hook(self._see_dense(experts.count) if experts.dense else self._see)

    def _see(self, _: Any, args: tuple[Any, ...]) -> None:
        self._seen.append(args[1].flatten(0, -2).sort(dim=-1).values.cpu())

    def _see_dense(self, count: int) -> Callable[[Any, tuple[Any, ...]], None]:
        """Of experts that are given every row, with zeros where it goes to another."""

        def see(_: Any, args: tuple[Any, ...]) -> None:
            self._seen.append(args[0].view(count, -1, args[0].shape[-1]).any(-1).T.long().cpu())

        return see

    def taken(self, rows: int) -> torch.Tensor:
        """[rows, choices of all layers]"""
        seen, self._seen = self._seen, []
        return torch.cat(seen, dim=-1) if seen else torch.zeros(rows, 0, dtype=torch.int64)


def rounded_family(directory: Path, family: str, times: float | None = None) -> Path:
    """`times`: how much larger queries are than they begin as."""
    from transformers import AutoModelForCausalLM

    path = saved_family(directory, family, CHANGES.get(family, BUILT.get(family)))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(torch.bfloat16)
    times = times or SHARPER.get(family, _SHARPER)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not _QUERIES.search(name):
                continue
            if weight.dim() == 1 and not weight.any():  # a norm that multiplies by 1 more
                weight.fill_(times - 1)
            else:
                weight[: len(weight) // (2 if "qkv" in name else 1)] *= times
    model.save_pretrained(path)
    return path


@dataclass(frozen=True, slots=True)
class Errors:
    """Of rows that count: how far ours are off, and transformers'."""

    ours: torch.Tensor
    plain: torch.Tensor

    @property
    def ratio(self) -> float:
        return _rms(self.ours) / _rms(self.plain)

    def __str__(self) -> str:
        return f"{_rms(self.ours):.4f} to {_rms(self.plain):.4f}, {self.ratio:.2f} times ({len(self.ours)} rows)"


def errors(runner: ModelRunner, path: Path) -> tuple[Errors, Errors]:
    """Of prompts, and of decodes."""
    known, watched = answered(runner)
    exact, exact_chosen = computed(path, torch.float32, known)
    plain, plain_chosen = computed(path, torch.bfloat16, known)
    found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for n, expected in exact.items():
        ours, chosen = torch.cat(watched.logits[n]), torch.cat(watched.chosen[n])
        assert ours.shape == plain[n].shape == expected.shape == (n + NEW_TOKENS - 1, VOCABULARY)
        alike = (chosen == exact_chosen[n]) & (plain_chosen[n] == exact_chosen[n])
        counts = int(alike.all(-1).long().cumprod(0).sum())
        spread = expected.std(-1)
        off = torch.stack([(logits - expected).square().mean(-1).sqrt() / spread for logits in (ours, plain[n])])
        found[False].append(off[:, : min(n, counts)])
        found[True].append(off[:, n:counts])
    prompts, decodes = (Errors(*torch.cat(found[decoded], dim=1)) for decoded in (False, True))
    return prompts, decodes


def _rms(off: torch.Tensor) -> float:
    return off.square().mean().sqrt().item()


def answered(runner: ModelRunner) -> tuple[dict[int, list[int]], Watched]:
    """Prompts with their answers, by their lengths."""
    watched = Watched(runner)
    runner.forward = watched  # type: ignore[assignment]
    facts = runner.facts
    limits = EngineLimits(
        BLOCK, CHUNK, 8, len(LENGTHS), facts.context_limit_tokens, facts.vocab_size,
        original_context_tokens=facts.original_context_tokens,
    )  # fmt: skip
    core = EngineCore(limits, BlockPool(runner.num_blocks), rules=[group.rule for group in runner.facts.groups])
    generator = torch.Generator().manual_seed(1)
    known = {n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS}
    for n, prompt in known.items():
        assert core.add(SequenceSpec(n, list(prompt), SamplingParams(max_tokens=NEW_TOKENS)), 0.0) is None
    while (plan := core.schedule(0.0)) is not None:
        watched.items = plan.items
        for token in core.commit(plan, runner.execute(plan), 0.0).tokens:
            known[token.sequence_id].append(token.token_id)
    return known, watched


def computed(
    path: Path, dtype: torch.dtype, known: dict[int, list[int]]
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """By transformers, of every token but the last: logits, and the experts that were chosen."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    routes = Routes(model)
    logits, chosen = {}, {}
    for n, tokens in known.items():
        with torch.inference_mode():
            logits[n] = model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0].float()
        chosen[n] = routes.taken(len(tokens) - 1)
    return logits, chosen


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.long) for family in PEOPLE_SERVE]
)
def test_logits_are_about_as_near_to_float32_as_transformers(family: str, tmp_path: Path) -> None:
    path = rounded_family(tmp_path, family)
    config = {"model": str(path), "dtype": "bfloat16", "num_blocks": BLOCKS, "block_tokens": BLOCK, "threads": 1}
    config["cuda_graphs"] = False  # what is replayed cannot be looked at
    runner = ModelRunner(EngineConfig.model_validate(config))
    name = runner.forward.name
    prompts, decodes = errors(runner, path)
    print(f"{family}, {name}: prompts {prompts}; decodes {decodes}")
    # What must be there to be compared.
    assert len(prompts.ours) >= FEWEST
    assert len(decodes.ours) >= FEWEST_DECODES
    assert prompts.ratio < BESIDE_TRANSFORMERS
    assert decodes.ratio < BESIDE_TRANSFORMERS
