"""Our engine against transformers `generate` and transformers' continuous batching.

Same model, dtype, threads and prompts, interleaved in one run, medians. Decode is the time from one new token to N new
tokens at a context of 128; prefill is one 512-token prompt to its first token.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch

from benchmarks.report import median, save, table
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec
from settings.model_path import resolve_model

CONTEXT, PREFILL = 128, 512
BATCHES = (1, 8, 32)


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1000, 40000) for _ in range(length)] for _ in range(count)]


class Ours:
    name = "diptych"

    def __init__(self, path: str, dtype: str, threads: int) -> None:
        self.runner = ModelRunner(
            EngineConfig.model_validate({"model": path, "dtype": dtype, "num_blocks": 400, "threads": threads})
        )

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        limits = EngineLimits(32, 8192, 64, 64, 8192, self.runner.facts.vocab_size)
        core = EngineCore(limits, BlockPool(self.runner.num_blocks))
        for i, prompt in enumerate(batch):
            assert core.add(SequenceSpec(i, prompt, SamplingParams(max_tokens=new_tokens)), 0.0) is None
        begun = time.perf_counter()
        while (plan := core.schedule(0.0)) is not None:
            core.commit(plan, self.runner.execute(plan), 0.0)
        return time.perf_counter() - begun


class Generate:
    name = "transformers generate"

    def __init__(self, path: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
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


class ContinuousBatching:
    name = "transformers continuous batching"

    def __init__(self, path: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="paged|sdpa"
        )
        self.model.eval()

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            num_blocks=512,
            max_batch_tokens=4096,
        )
        begun = time.perf_counter()
        results = self.model.generate_batch(inputs=batch, generation_config=config, progress_bar=False)
        elapsed = time.perf_counter() - begun
        assert all(len(r.generated_tokens) == new_tokens for r in results.values())
        return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=33)
    arguments = parser.parse_args()
    path = resolve_model(arguments.model)
    torch.set_num_threads(arguments.threads)
    engines: list[Any] = [Ours(path, arguments.dtype, arguments.threads), Generate(path, arguments.dtype)]
    try:
        engines.append(ContinuousBatching(path, arguments.dtype))
        engines[-1].run(prompts(1, 8, 0), 2)
    except Exception as error:
        print(f"transformers continuous batching does not run here: {type(error).__name__}: {error}")
        engines.pop()

    n = arguments.new_tokens
    times: dict[str, dict[str, list[float]]] = {e.name: {} for e in engines}
    for engine in engines:
        engine.run(prompts(1, PREFILL, 1), 2)  # first passes are not counted
        engine.run(prompts(8, CONTEXT, 1), 2)
    for repeat in range(arguments.repeats):
        for engine in engines if repeat % 2 == 0 else engines[::-1]:
            found = times[engine.name]
            one = engine.run(prompts(1, PREFILL, 10 + repeat), 1)
            if isinstance(engine, ContinuousBatching):
                # Each `generate_batch` starts its manager anew, for longer than a prompt takes: what more prompts cost.
                one = (engine.run(prompts(9, PREFILL, 50 + repeat), 1) - one) / 8
            found.setdefault("prefill 512", []).append(one)
            for size in BATCHES:
                batch = prompts(size, CONTEXT, 100 * size + repeat)
                first = engine.run(batch, 1)
                found.setdefault(f"decode batch {size}", []).append((engine.run(batch, n) - first) / (n - 1) / size)

    points = ["prefill 512", *(f"decode batch {size}" for size in BATCHES)]
    per_time = {p: PREFILL if p.startswith("prefill") else 1 for p in points}
    rates = {name: {p: per_time[p] / median(found[p]) for p in points} for name, found in times.items()}
    table(("tokens/s", *points), [(name, *(f"{rate[p]:.1f}" for p in points)) for name, rate in rates.items()])
    # Pair by pair within a repeat, so that a machine that changes speed does not decide.
    ratios = {
        p: median(
            [min(times[e.name][p][i] for e in engines[1:]) / times["diptych"][p][i] for i in range(arguments.repeats)]
        )
        for p in points
    }
    table(("ratio to the better", *points), [("diptych", *(f"{ratios[p]:.2f}" for p in points))])
    save(
        "engine",
        {
            "dtype": arguments.dtype,
            "threads": arguments.threads,
            "tokens_per_s": rates,
            "ratio_to_best_transformers": ratios,
        },
    )


if __name__ == "__main__":
    main()
