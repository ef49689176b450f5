"""The sampler against the one of an earlier commit, on the same logits, step by step, interleaved in one run.

Logits: shares proportional to rank**-1.5 over a vocabulary of 49,152, each row in its own order, with noise. Histories
begin with 512 tokens and grow by the token that was sampled. Milliseconds a step, medians; tokens are compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import median, parse, save, table
from engine.sampler import Sampler
from engine.types import PlanItem, SamplingParams

VOCABULARY, HISTORY, PROMPT = 49152, 512, 384
BATCHES = (1, 8, 64, 256)
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "greedy, penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    "greedy, min_tokens": {"min_tokens": 10**6, "stop_token_ids": frozenset([0, 2])},
    "greedy, 5 logprobs": {"logprobs": 5},
    "all": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "logprobs": 5,
    },
}
Step = Callable[[torch.Tensor, list[PlanItem]], tuple[list[int], list[Any]]]


def sampler_of(commit: str) -> Step:
    """The `sample` function of engine/sampler.py at `commit`."""
    root = Path(__file__).resolve().parents[1]
    show = ["git", "show", f"{commit}:engine/sampler.py"]
    done = subprocess.run(show, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the sampler of {commit} is not here ({done.stderr.strip()}); use a clone with its history")
    module = types.ModuleType("sampler_before")
    sys.modules["sampler_before"] = module
    exec(compile(done.stdout, "sampler_before", "exec"), module.__dict__)
    return module.sample


def logits_of(rows: int, device: str) -> torch.Tensor:
    rng = np.random.default_rng(rows)
    ranks = rng.permuted(np.broadcast_to(np.arange(1, VOCABULARY + 1), (rows, VOCABULARY)), axis=1)
    values = -1.5 * np.log(ranks) + 0.1 * rng.standard_normal((rows, VOCABULARY))
    return torch.from_numpy(values.astype(np.float32)).to(device)


def timed(step: Step, logits: torch.Tensor, items: list[PlanItem]) -> tuple[float, list[int]]:
    begun = time.perf_counter()
    tokens, _ = step(logits, items)  # both end in tolist(), which waits for the device
    return (time.perf_counter() - begun) * 1e3, tokens


def measure(before: Step, logits: torch.Tensor, case: dict[str, Any], repeats: int) -> tuple[float, float, int]:
    """Medians before and after in ms, and tokens that differ."""
    rows = len(logits)
    rng = np.random.default_rng(7)
    histories = [rng.integers(0, VOCABULARY, HISTORY).tolist() for _ in range(rows)]
    params = [SamplingParams(seed=i, **case) for i in range(rows)]
    after = Sampler(VOCABULARY).sample
    times: tuple[list[float], list[float]] = ([], [])
    differ = 0
    for repeat in range(repeats + 2):
        items = [
            PlanItem(i, [0], 0, [0], True, HISTORY - PROMPT + repeat, p, PROMPT, h)
            for i, (p, h) in enumerate(zip(params, histories, strict=True))
        ]
        found: dict[int, tuple[float, list[int]]] = {}
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            found[which] = timed((before, after)[which], logits, items)
        differ += sum(a != b for a, b in zip(found[0][1], found[1][1], strict=True))
        for history, token in zip(histories, found[0][1], strict=True):
            history.append(token)
        if repeat >= 2:  # first steps are not counted
            times[0].append(found[0][0])
            times[1].append(found[1][0])
    return median(times[0]), median(times[1]), differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default="479088e", help="commit whose sampler is compared")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parse(parser, repeats=1)
    torch.set_num_threads(arguments.threads)
    before = sampler_of(arguments.before)
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in CASES}
    with torch.inference_mode():
        for rows in BATCHES[:1] if arguments.smoke else BATCHES:
            logits = logits_of(rows, arguments.device)
            for name, case in CASES.items():
                old, new, differ = measure(before, logits, case, arguments.repeats)
                results[name][rows] = {
                    "before_ms": round(old, 3),
                    "after_ms": round(new, 3),
                    "ratio": round(old / new, 2),
                    "tokens_that_differ": differ,
                }
    table(
        ("ms before -> after", *(f"batch {rows}" for rows in results["greedy"])),
        [
            (name, *(f"{r['before_ms']:.2f} -> {r['after_ms']:.2f}" for r in by_rows.values()))
            for name, by_rows in results.items()
        ],
    )
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu"
    suffix = "" if device == "cpu" else "-gpu"
    save(
        f"sampler{suffix}",
        {"before": arguments.before, "device": device, "threads": arguments.threads, "vocabulary": VOCABULARY}
        | {"cases": results},
    )


if __name__ == "__main__":
    main()
