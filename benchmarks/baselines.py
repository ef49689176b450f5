"""The engines in this process that benchmarks/engine.py compares: run a batch of prompts, say how long it took.

vLLM is in processes of its own: benchmarks/vllm_process.py.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec


class Engine(Protocol):
    name: str

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        """Seconds until every prompt of the batch has `new_tokens` greedy tokens, whatever they are."""
        ...


class Ours:
    name = "diptych"

    def __init__(self, path: str, dtype: str, threads: int) -> None:
        self.runner = ModelRunner(
            EngineConfig.model_validate({"model": path, "dtype": dtype, "num_blocks": 400, "threads": threads})
        )

    def core(self) -> EngineCore:
        """A new one, whose pool is empty."""
        limits = EngineLimits(32, 8192, 64, 64, 8192, self.runner.facts.vocab_size)
        rules = [group.rule for group in self.runner.shape.groups]
        return EngineCore(limits, BlockPool(self.runner.num_blocks), rules=rules)

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        core = self.core()
        for i, prompt in enumerate(batch):
            assert core.add(SequenceSpec(i, prompt, SamplingParams(max_tokens=new_tokens)), 0.0) is None
        begun = time.perf_counter()
        while (plan := core.schedule(0.0)) is not None:
            core.commit(plan, self.runner.execute(plan), 0.0)
        return time.perf_counter() - begun


class Generate:
    name = "transformers generate"

    def __init__(self, path: str, dtype: str, attention: str | None = "sdpa") -> None:
        """`attention`: None = what transformers chooses for the model."""
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        )
        self.model.eval()

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        ids = torch.tensor(batch)
        begun = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - begun


PAGE = 32  # tokens of a page of continuous batching's KV


class ContinuousBatching:
    name = "transformers continuous batching"

    def __init__(self, path: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="paged|sdpa"
        )
        self.model.eval()

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        # Left to itself it takes 60 % of the memory that is free, and each step builds a mask of tokens times KV slots.
        pages = sum(-(-(len(prompt) + new_tokens) // PAGE) + 1 for prompt in batch)
        tokens = min(4096, sum(map(len, batch)))
        sizes = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=tokens)
        begun = time.perf_counter()
        results = self.model.generate_batch(
            inputs=batch, generation_config=config, continuous_batching_config=sizes, progress_bar=False
        )
        elapsed = time.perf_counter() - begun
        assert all(len(r.generated_tokens) == new_tokens for r in results.values())
        return elapsed
