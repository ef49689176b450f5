"""Models built in code: a shape, random weights, no files. And the engine over them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch


class Model(Protocol):
    """What is built: a configuration of transformers, made on the spot."""

    @property
    def name(self) -> str: ...

    @property
    def vocab(self) -> int: ...

    def config(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0  # 0: dense
    experts_per_token: int = 0
    initializer_range: float = 0.02

    def config(self) -> Any:
        from transformers import LlamaConfig, Qwen3MoeConfig

        common: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 32768,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        if not self.experts:
            return LlamaConfig(intermediate_size=self.intermediate, **common)
        return Qwen3MoeConfig(
            intermediate_size=self.intermediate,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            norm_topk_prob=True,
            **common,
        )

    def parameters(self) -> int:
        """About; to know whether the weights fit before they are made."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate * max(1, self.experts)
        return self.layers * (attention + mlp) + 2 * self.vocab * self.hidden


# The shapes of Llama-3.2-1B, Llama-3.1-8B and Qwen3-30B-A3B.
SHAPES = (
    Shape("1B", 16, 2048, 32, 8, 64, 8192, 128256),
    Shape("8B", 32, 4096, 32, 8, 128, 14336, 128256),
    Shape("MoE 30B-A3B", 48, 2048, 32, 4, 128, 768, 151936, experts=128, experts_per_token=8),
)
TINY_SHAPES = (
    Shape("tiny dense", 2, 64, 4, 2, 16, 128, 512),
    Shape("tiny MoE", 2, 64, 4, 2, 16, 32, 512, experts=4, experts_per_token=2),
)
# For exactness: logits well apart, so that rounding decides no token.
EXACT = Shape("exact", 4, 256, 8, 4, 64, 512, 4096, initializer_range=0.1)


@dataclass(frozen=True, slots=True)
class Weights:
    """Counted before projections are merged. `expert` and `head` are parameters; the embedding table is looked up."""

    dense: int
    expert: int
    head: int
    element_bytes: int


def build(model: Model, device: torch.device, dtype: torch.dtype, attention: str | None = None, seed: int = 0) -> Any:
    """Made on the device itself: an 8B model's random weights take minutes on a CPU. `attention`: None is what
    transformers takes for the family.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        made: Any = AutoModelForCausalLM.from_config(
            model.config(), dtype=dtype, attn_implementation=attention, experts_implementation="eager"
        )
    return made.to(device).eval().requires_grad_(False)


def weigh(model: Any) -> Weights:
    dense = expert = head = 0
    for name, parameter in model.named_parameters():
        if "lm_head" in name:
            head += parameter.numel()
        elif ".experts." in name:
            expert += parameter.numel()
        elif "embed_tokens" not in name:
            dense += parameter.numel()
    return Weights(dense, expert, head, next(model.parameters()).element_size())


@contextlib.contextmanager
def _no_loading(shape: Model, dtype: torch.dtype, weighed: list[Weights]) -> Iterator[None]:
    """The runner's loader, with the reading of files left out and everything else as it is."""
    from engine import model_check, model_loader
    from engine.attention.interface import ATTENTION_NAME

    def load(
        _model: str, _dtype: str, device: torch.device, context_limit_tokens: int | None, *others: Any
    ) -> tuple[Any, Any, Any]:
        assert not any(others), "ranks and quantization are of models that are read"
        model = build(shape, device, dtype, ATTENTION_NAME)
        limit = model_check.choose_limit(model.config, {}, context_limit_tokens)
        weighed.append(weigh(model))
        trial, layers = model_loader.prepare(model, {}, dtype, limit)
        original = trial.reference.original
        facts = model_loader.facts_of(model.config, shape.name, shape.name, dtype, limit, layers, original)
        return model, facts, trial

    with mock.patch("engine.runner.load_model", load):
        yield


def make_runner(device: torch.device, shape: Model, dtype: str, num_blocks: int, **engine: Any) -> tuple[Any, Weights]:
    """A ModelRunner over random weights."""
    from engine.config import EngineConfig
    from engine.runner import ModelRunner

    weighed: list[Weights] = []
    name = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
    config = EngineConfig.model_validate(
        {"model": "random", "dtype": dtype, "device": name, "num_blocks": num_blocks, **engine}
    )
    with _no_loading(shape, getattr(torch, dtype), weighed):
        runner = ModelRunner(config)
    return runner, weighed[0]


def make_core(runner: Any, max_batch_tokens: int, pool: Any = None) -> Any:
    from engine.block_pool import BlockPool
    from engine.core import EngineCore
    from engine.scheduler import EngineLimits

    limits = EngineLimits(
        block_tokens=runner.block_tokens,
        max_batch_tokens=max_batch_tokens,
        max_running_sequences=min(1024, max_batch_tokens),
        max_waiting_sequences=4096,
        context_limit_tokens=runner.facts.context_limit_tokens,
        vocab_size=runner.facts.vocab_size,
        original_context_tokens=runner.facts.original_context_tokens,
    )
    rules = [group.rule for group in runner.shape.groups]
    return EngineCore(limits, pool or BlockPool(runner.num_blocks), rules=rules)


def answer(
    runner: Any, prompts: list[list[int]], new_tokens: int, max_batch_tokens: int, *, overlap: bool = False
) -> list[list[int]]:
    """Greedy answers of all prompts at once, by a core of their own. `overlap`: each step is launched before the one
    before it is waited for, as with engine.async_scheduling."""
    from engine.types import SamplingParams, SequenceSpec

    core = make_core(runner, max_batch_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        refusal = core.add(SequenceSpec(i, prompt, SamplingParams(max_tokens=new_tokens)), 0.0)
        assert refusal is None, refusal
    flying: list[tuple[Any, Any]] = []
    while True:
        plan = core.schedule(0.0)
        if plan is not None:
            flying.append((plan, runner.launch(plan)))
        if not flying:
            break
        if plan is None or len(flying) > overlap:
            oldest, step = flying.pop(0)
            for token in core.commit(oldest, step.wait(), 0.0).tokens:
                answers[token.sequence_id].append(token.token_id)
    core.check()
    return answers


def prompt_of(length: int, vocab: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length)]
