"""What grammars and biases cost a step of the sampler, on the same logits, interleaved in one run.

Logits are noise. Matchers follow a JSON Schema (an array of objects); each row takes the token that was sampled, and
begins anew when its answer is complete. Milliseconds a step, medians; the parts in brackets: filling the masks, and
taking the tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from benchmarks.report import median, parse, save, table
from engine.grammar import GrammarCompiler, Masks, Matcher
from engine.sampler import Sampler
from engine.types import PlanItem, SamplingParams
from grammar.structured import Kind, Structured

VOCABULARY = 49152
BATCHES = (1, 32, 256)
SCHEMA = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "tags": {"items": {"type": "string"}}},
        "required": ["name", "count"],
        "additionalProperties": False,
    },
}
BIAS = tuple((token, 1.0) for token in range(0, 3000, 100))
# name: parameters, share of rows with a grammar
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "greedy": ({}, 0.0),
    "greedy, one row masked": ({}, 1e-9),
    "greedy, all masked": ({}, 1.0),
    "greedy, 30 biases": ({"logit_bias": BIAS}, 0.0),
    "temperature": ({"temperature": 0.8}, 0.0),
    "temperature, all masked": ({"temperature": 0.8}, 1.0),
}


class Rows:
    """One case at one batch size: its sampler, and sequences that grow."""

    def __init__(self, grammar: Any, rows: int, case: dict[str, Any], share: float) -> None:
        self._grammar = grammar
        masked = min(rows, int(share * rows) or (1 if share else 0))
        self._matchers: list[Matcher | None] = [grammar.start() if i < masked else None for i in range(rows)]
        self._params = [SamplingParams(seed=i, max_tokens=10**6, **case) for i in range(rows)]
        self._histories: list[list[int]] = [[1, 2, 3] for _ in range(rows)]
        self._sampler = Sampler(VOCABULARY)
        self._masks = Masks(VOCABULARY)

    def step(self, logits: torch.Tensor) -> tuple[float, float, float]:
        """Milliseconds: the sampler and the taking of tokens; the masks; the taking."""
        items = [
            PlanItem(i, [0], 0, [0], True, len(h) - 3, p, 3, h, m)
            for i, (h, p, m) in enumerate(zip(self._histories, self._params, self._matchers, strict=True))
        ]
        live = [m for m in self._matchers if m is not None]
        begun = time.perf_counter()
        if live:
            self._masks.fill(live)
        filled = time.perf_counter()
        tokens, _ = self._sampler.sample(logits, items)
        sampled = time.perf_counter()
        for matcher, token in zip(self._matchers, tokens, strict=True):
            if matcher is not None:
                assert matcher.advance((token,))
        taken = time.perf_counter()
        for i, token in enumerate(tokens):
            self._histories[i].append(token)
            matcher = self._matchers[i]
            if matcher is not None and matcher.complete:
                self._matchers[i] = self._grammar.start()
        return (taken - filled) * 1e3, (filled - begun) * 1e3, (taken - sampled) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parse(parser, repeats=1)
    torch.set_num_threads(arguments.threads)
    compiler = GrammarCompiler(arguments.model, VOCABULARY)
    compiler.prepare()
    begun = time.perf_counter()
    grammar = compiler.compile(Structured(Kind.JSON_SCHEMA, json.dumps(SCHEMA)))
    compile_ms = (time.perf_counter() - begun) * 1e3
    generator = torch.Generator().manual_seed(0)
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in CASES}
    with torch.inference_mode():
        for rows in BATCHES[:1] if arguments.smoke else BATCHES:
            cases = {name: Rows(grammar, rows, case, share) for name, (case, share) in CASES.items()}
            times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CASES}
            for repeat in range(arguments.repeats + 3):
                logits = (torch.randn((rows, VOCABULARY), generator=generator) * 2).to(arguments.device)
                for name, case in cases.items():
                    found = case.step(logits)
                    if repeat >= 3:  # first steps are not counted
                        times[name].append(found)
            for name, found in times.items():
                step, masks, advance = (round(median([t[i] for t in found]), 3) for i in range(3))
                results[name][rows] = {"step_ms": step, "masks_ms": masks, "advance_ms": advance}
    table(
        ("ms a step (masks, advance)", *(f"batch {rows}" for rows in results["greedy"])),
        [
            (name, *(f"{r['step_ms']:.2f} ({r['masks_ms']:.2f}, {r['advance_ms']:.2f})" for r in by_rows.values()))
            for name, by_rows in results.items()
        ],
    )
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu"
    facts = {
        "device": device,
        "threads": arguments.threads,
        "vocabulary": VOCABULARY,
        "compile_ms": round(compile_ms, 2),
    }
    save("masks" if device == "cpu" else "masks-gpu", {**facts, "cases": results})


if __name__ == "__main__":
    main()
