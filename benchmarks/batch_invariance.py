"""How often greedy tokens change with the batch, and what it costs to rule that out (engine.batch_invariant).

Prompts of random tokens, answered greedily alone and in batches of 8 (each batch enters in chunks of 100 tokens).
An answer is compared up to and including its first token that differs: what follows has another history. Times are
medians of runs that alternate between the two modes.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence

import torch

from benchmarks.report import median, parse, save, table
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.runner import ModelRunner
from engine.sampler import Drawn
from engine.scheduler import EngineLimits
from engine.types import PlanItem, SamplingParams, SequenceSpec
from settings.model_path import resolve_model

CONTEXT, BATCH = 64, 8


class Greedy:
    """In place of the sampler: keeps the logits that each token was taken from."""

    def __init__(self) -> None:
        self.logits: dict[int, list[torch.Tensor]] = {}

    def draw(self, logits: torch.Tensor, items: Sequence[PlanItem]) -> Drawn:
        for row, item in zip(logits, items, strict=True):
            self.logits.setdefault(item.sequence_id, []).append(row.clone())
        return Drawn(len(items), logits.argmax(dim=-1), None)


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1000, 40000) for _ in range(length)] for _ in range(count)]


def run(
    runner: ModelRunner, batch: list[list[int]], new_tokens: int, budget: int = 8192
) -> tuple[float, list[list[torch.Tensor]]]:
    """Seconds, and the logits of each answer's tokens."""
    greedy = Greedy()
    runner._sampler = greedy  # type: ignore[assignment]
    core = EngineCore(EngineLimits(32, budget, 64, 64, 8192, runner.facts.vocab_size), BlockPool(runner.num_blocks))
    for i, prompt in enumerate(batch):
        assert core.add(SequenceSpec(i, prompt, SamplingParams(max_tokens=new_tokens)), 0.0) is None
    begun = time.perf_counter()
    while (plan := core.schedule(0.0)) is not None:
        core.commit(plan, runner.execute(plan), 0.0)
    return time.perf_counter() - begun, [greedy.logits[i] for i in range(len(batch))]


def compare(runner: ModelRunner, sequences: int, new_tokens: int) -> dict[str, float]:
    """Alone against in a batch."""
    compared = logits_differ = answers_differ = 0
    for start in range(0, sequences, BATCH):
        batch = prompts(BATCH, CONTEXT, seed=start)
        _, together = run(runner, batch, new_tokens, budget=100)
        for prompt, found in zip(batch, together, strict=True):
            _, (alone,) = run(runner, [prompt], new_tokens)
            for a, b in zip(alone, found, strict=True):
                compared += 1
                logits_differ += not torch.equal(a, b)
                if int(a.argmax()) != int(b.argmax()):
                    answers_differ += 1
                    break
    return {
        "answers": sequences,
        "answers_that_differ": answers_differ,
        "tokens_compared": compared,
        "tokens_with_other_logits": logits_differ,
        "flips_per_1000_tokens": round(1000 * answers_differ / compared, 2),
    }


def cost(runners: dict[str, ModelRunner], repeats: int, prompt: int, new_tokens: int) -> dict[str, dict[str, float]]:
    """Milliseconds: a prompt, and a decode step at batch 1 and 8."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
    for repeat in range(repeats + 1):
        for name in runners if repeat % 2 else reversed(runners):
            runner = runners[name]
            found = {f"prefill {prompt}": run(runner, prompts(1, prompt, repeat), 1)[0]}
            for size in (1, BATCH):
                batch = prompts(size, CONTEXT, 100 * size + repeat)
                first = run(runner, batch, 1)[0]
                found[f"decode batch {size}"] = (run(runner, batch, new_tokens)[0] - first) / (new_tokens - 1)
            if repeat:  # first passes are not counted
                for point, seconds in found.items():
                    times[name].setdefault(point, []).append(seconds * 1e3)
    return {name: {point: round(median(v), 1) for point, v in found.items()} for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512, help="tokens, of a prompt that is timed")
    parser.add_argument("--steps", type=int, default=8, help="decode steps that are timed together")
    arguments = parse(parser, sequences=8, new_tokens=2, repeats=1, prompt=128, steps=1)
    path = resolve_model(arguments.model)
    runners = {
        name: ModelRunner(
            EngineConfig.model_validate(
                {
                    "model": path,
                    "dtype": arguments.dtype,
                    "device": arguments.device,
                    "num_blocks": 200,
                    "context_limit_tokens": 2 * arguments.prompt,  # what is tried at start, and it takes long
                    "threads": arguments.threads,
                    "kernels": kernels,
                    "batch_invariant": invariant,
                }
            )
        )
        for name, kernels, invariant in (
            ("torch", "torch", False),
            ("torch, batch-invariant", "torch", True),
            ("default", "auto", False),
        )
    }
    costs = cost(runners, arguments.repeats, arguments.prompt, 1 + arguments.steps)
    changes = {name: compare(r, arguments.sequences, arguments.new_tokens) for name, r in runners.items()}
    table(("", *changes["default"]), [(name, *c.values()) for name, c in changes.items()])
    table(("ms", *costs["default"]), [(name, *c.values()) for name, c in costs.items()])
    suffix = "" if arguments.device == "cpu" else "-gpu"
    save(
        f"batch_invariance-{arguments.dtype}{suffix}",
        {"dtype": arguments.dtype, "device": runners["default"].describe_device()}
        | {"alone_against_batch": changes, "ms": costs},
    )


if __name__ == "__main__":
    main()
