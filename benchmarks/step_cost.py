"""What a step of the real engine costs: coefficients fitted to measured steps, written for the simulator.

    python -m benchmarks.step_cost                  # simulator/cost_model.py says what the file means

Decodes alone, chunks of prompts alone and both together, of many sizes and contexts, in random order, the median of the
repeats of each. Least squares of relative errors, no coefficient below zero. A worker learns the same coefficients
online (engine/step_cost.py); how near that comes is in the report: it is fed the same steps, in the same order.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import RESULTS, median, parse, provenance, save, table
from benchmarks.steps import Part, Steps
from engine.config import EngineConfig
from engine.runner import ModelRunner
from engine.step_cost import StepCostEstimate, StepShape, shape_of
from settings.model_path import resolve_model
from simulator.cost_model import CostModel, StepCost
from simulator.cost_model import save as save_cost_model


@dataclass(frozen=True, slots=True)
class Measured:
    kind: str
    shape: StepShape
    ms: float


def cases(rng: random.Random) -> list[tuple[str, list[Part]]]:
    """Contexts vary within a batch, as they do in service."""

    def decodes(count: int, context: int) -> list[Part]:
        return [Part(max(1, int(context * rng.uniform(0.5, 1.5))), 1) for _ in range(count)]

    found = [
        ("decode", decodes(count, context))
        for count, context in itertools.product((1, 2, 4, 8, 16, 32), (64, 256, 1024, 2048))
    ]
    found += [
        ("prompt", [Part(start, tokens)])
        for start, tokens in itertools.product((0, 512, 2048, 4096), (32, 128, 256, 512, 1024))
    ]
    found += [
        ("mixed", [*decodes(count, context), Part(start, tokens)])
        for count, context, start, tokens in itertools.product((4, 16, 32), (256, 1024), (0, 2048), (32, 128, 512))
    ]
    return found


def features(shapes: Sequence[StepShape]) -> np.ndarray:
    return np.array([[1, s.sequences, s.tokens, s.context_tokens, s.attention_pairs] for s in shapes], dtype=float)


def fit(shapes: Sequence[StepShape], ms: Sequence[float]) -> StepCost:
    """Least squares of (expected - measured) / measured with no coefficient below zero: the best subset of five."""
    x = features(shapes) / np.array(ms)[:, None]
    scale = np.abs(x).max(axis=0)
    best, best_error = np.zeros(5), np.inf
    for count in range(1, 6):
        for chosen in itertools.combinations(range(5), count):
            columns = list(chosen)
            found, *_ = np.linalg.lstsq(x[:, columns] / scale[columns], np.ones(len(ms)), rcond=None)
            weights = np.zeros(5)
            weights[columns] = found / scale[columns]
            error = float(((x @ weights - 1) ** 2).sum())
            if (found >= 0).all() and error < best_error:
                best, best_error = weights, error
    return StepCost(*best.tolist())


def residuals(expected: Sequence[float], ms: Sequence[float]) -> dict[str, float]:
    e, m = np.array(expected), np.array(ms)
    relative = np.abs(e - m) / m
    return {
        "median_relative_error": float(np.median(relative)),
        "p90_relative_error": float(np.quantile(relative, 0.9)),
        "r2": float(1 - ((e - m) ** 2).sum() / ((m - m.mean()) ** 2).sum()),
    }


def expected_ms(cost: StepCost, shapes: Sequence[StepShape]) -> list[float]:
    return [cost.ms(s.sequences, s.tokens, s.context_tokens, s.attention_pairs) for s in shapes]


def measure(steps: Steps, repeats: int, seed: int, few: bool) -> tuple[list[Measured], dict[str, float]]:
    """The medians, and how near the online fit came to each step before it saw it. `few`: every eighth case."""
    rng = random.Random(seed)
    wanted = cases(rng)[:: 8 if few else 1]
    times: list[list[float]] = [[] for _ in wanted]
    online, errors = StepCostEstimate(), []
    for repeat in range(repeats + 1):
        order = list(range(len(wanted)))
        rng.shuffle(order)
        for i in order if repeat else order[::4]:
            parts = wanted[i][1]
            shape = shape_of(steps.plan(parts).items)
            ms = steps.ms(parts)
            if repeat == 0:
                continue  # first passes are not counted
            cost = online.cost()
            if online.steps > 20:
                guess = cost.ms(shape.sequences, shape.tokens, shape.context_tokens, shape.attention_pairs)
                errors.append(abs(guess - ms) / ms)
            online.observe(shape, ms)
            times[i].append(ms)
    measured = [
        Measured(kind, shape_of(steps.plan(parts).items), median(found))
        for (kind, parts), found in zip(wanted, times, strict=True)
    ]
    return measured, {
        "median_relative_error": float(np.median(errors)),
        "p90_relative_error": float(np.quantile(errors, 0.9)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="", help="of the cost model; empty = model and device")
    parser.add_argument("--out", default="", help="the cost model's file; empty = beside the dated results")
    arguments = parse(parser, repeats=3)
    settings: dict[str, Any] = {"model": str(resolve_model(arguments.model)), "dtype": arguments.dtype}
    runner = ModelRunner(
        EngineConfig.model_validate({**settings, "threads": arguments.threads, "num_blocks": 3400, "block_tokens": 32})
    )
    measured, online = measure(Steps(runner), arguments.repeats, 1, arguments.smoke)
    shapes, ms = [m.shape for m in measured], [m.ms for m in measured]
    cost = fit(shapes, ms)
    found: dict[str, Any] = residuals(expected_ms(cost, shapes), ms)
    for kind in ("decode", "prompt", "mixed"):
        own = [m for m in measured if m.kind == kind]
        found[kind] = residuals(expected_ms(cost, [m.shape for m in own]), [m.ms for m in own])

    where = provenance()
    name = arguments.name or f"{runner.facts.name} on {runner.device.type}"
    kv_bytes = runner.block_bytes // runner.block_tokens
    model = CostModel(
        name=name,
        source=f"{where['command']}, {where['machine']}, {runner.describe_device()}, commit {where['commit']}, "
        f"{where['date']}",
        measured=True,
        step=cost,
        kv_bytes_per_token=kv_bytes,
        kv_capacity_tokens=int(0.8 * (1 << 30)) // kv_bytes,  # what a worker on CPU takes by default
        residuals=found,
    )
    path = Path(arguments.out) if arguments.out else RESULTS / "cost-model.json"
    if arguments.out or not arguments.smoke:
        save_cost_model(model, path)
    coefficients = asdict(cost)
    table(("coefficient", "value"), [(key, f"{value:.6g}") for key, value in coefficients.items()])
    rows = [(kind, *(f"{found[kind][key]:.3f}" for key in found[kind])) for kind in ("decode", "prompt", "mixed")]
    table(("relative error", "median", "p90", "R2"), rows)
    print(f"online, before each step was seen: {online}\nwritten to {path}")
    save("step_cost", {"steps": len(measured), "step": coefficients, "residuals": found, "online": online})


if __name__ == "__main__":
    main()
