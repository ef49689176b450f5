"""Weights in 8 and 4 bits (whole numbers and fp8) and KV in 8 against what they come from: what it costs and gains.

    python -m benchmarks.quantization              # all of it
    python -m benchmarks.quantization quality      # perplexity, KL divergence, greedy agreement; by layers
    python -m benchmarks.quantization speed        # tokens/s and bytes of the engine
    python -m benchmarks.quantization kv           # both, of KV: quality, bytes, a decode step at a long context

Quality is of transformers' own float32 model with rounded weights, over windows of a text that stays: this project's
records of decisions. KL is of the next-token distributions, from the unrounded model's to the rounded one's; agreement
is how often both would choose the same token. The sensitivity map rounds one group of a piece of the layers at a time.
Of KV it is the same model with a cache that gives back rounded keys and values.

Speed is of steps of given shapes straight into the runner (benchmarks/steps.py), all schemes in turns; a ratio is of
neighbouring runs.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.report import median, parse, save, table
from benchmarks.steps import Part, Steps
from engine.config import EngineConfig
from engine.kv_rounding import rounded, rounding_of
from engine.native.stack import NativeStack
from engine.quantization import layers_of, scales_of, scheme_of
from engine.quantization import rounded as rounded_weight
from engine.runner import ModelRunner
from settings.model_path import resolve_model

_TEXTS = Path(__file__).resolve().parents[1] / "docs" / "decisions"
_WINDOW = 512
GROUPS = ("mlp", "attention", "head")
COMBINED: dict[str, tuple[str, ...]] = {**{group: (group,) for group in GROUPS}, "all": GROUPS}
SERVED: dict[str, dict[str, Any]] = {
    "none": {},
    "int8 mlp": {"quantization": "int8"},
    "int4 mlp": {"quantization": "int4"},
    "fp8 mlp": {"quantization": "fp8"},
    "int8 all": {"quantization": "int8", "quantized_groups": GROUPS},
    "int4 all": {"quantization": "int4", "quantized_groups": GROUPS},
    "fp8 all": {"quantization": "fp8", "quantized_groups": GROUPS},
}


NUMBERS = ("int8", "int4", "fp8")
KV = ("model", "int8", "int8_values", "fp8", "fp8_values")


class Quality:
    """Of one model whose weights are rounded and put back."""

    def __init__(self, path: str, tokens: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        text = "\n\n".join(file.read_text() for file in sorted(_TEXTS.glob("*.md")))
        ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")["input_ids"][0, :tokens]
        self.tokens = len(ids)
        self._windows = ids.split(_WINDOW)
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
        self._layers = {group: dict(layers_of(self._model, group)) for group in GROUPS}
        self.num_layers = self._model.config.get_text_config().num_hidden_layers
        self._kv = "model"
        self._right = [self._log_probabilities(window) for window in self._windows]

    def of(self, quantization: str, groups: tuple[str, ...], first: int = 0, end: int = 1 << 30) -> dict[str, float]:
        """With layers `first` .. `end` of these groups rounded; the head is of no layer."""
        with self._rounded(quantization, groups, lambda number: number is None or first <= number < end):
            return self.now()

    def with_kv(self, kv_dtype: str) -> dict[str, float]:
        """Of the weights as they are."""
        self._kv = kv_dtype
        try:
            return self.now()
        finally:
            self._kv = "model"

    def now(self) -> dict[str, float]:
        losses, divergences, same = [], [], []
        for window, right in zip(self._windows, self._right, strict=True):
            ours = self._log_probabilities(window)
            losses.append(-ours[:-1].gather(1, window[1:, None])[:, 0])
            divergences.append((right.exp() * (right - ours)).sum(-1))
            same.append(ours.argmax(-1) == right.argmax(-1))
        return {
            "perplexity": math.exp(torch.cat(losses).mean().item()),
            "kl": torch.cat(divergences).mean().item(),
            "kl_p99": torch.cat(divergences).quantile(0.99).item(),
            "agreement": torch.cat(same).float().mean().item(),
        }

    def _log_probabilities(self, window: torch.Tensor) -> torch.Tensor:
        cache = {} if self._kv == "model" else {"past_key_values": _cache(self._model.config, self._kv)}
        with torch.inference_mode():
            answer = self._model(input_ids=window[None], use_cache=bool(cache), **cache)
            return answer.logits[0].float().log_softmax(-1)

    @contextlib.contextmanager
    def _rounded(
        self, quantization: str, groups: tuple[str, ...], chosen: Callable[[int | None], bool]
    ) -> Iterator[None]:
        scheme = scheme_of(quantization, groups)
        assert scheme is not None
        before: list[tuple[Any, nn.Parameter]] = []
        for group in groups:
            for path, layer in self._layers[group].items():
                number = re.search(r"layers\.(\d+)\.", path)
                if chosen(int(number[1]) if number else None):
                    before.append((layer, layer.weight))
                    scales = scales_of(layer.weight, scheme)
                    weight = rounded_weight(layer.weight, scales, scheme.bits)
                    layer.weight = nn.Parameter(weight, requires_grad=False)
        try:
            yield
        finally:
            for layer, weight in before:
                layer.weight = weight


def _cache(config: Any, kv_dtype: str) -> Any:
    """transformers' own, which keeps keys and values rounded."""
    from transformers import DynamicCache

    class Rounded(DynamicCache):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            kept = rounded(rounding_of(kv_dtype), key_states, value_states)
            return super().update(*kept, *args, **kwargs)

    return Rounded(config=config)


def show(schemes: dict[str, dict[str, float]]) -> None:
    table(
        ("", "perplexity", "KL", "KL, worst 1 %", "same choice"),
        [
            (name, f"{q['perplexity']:.3f}", f"{q['kl']:.5f}", f"{q['kl_p99']:.4f}", f"{q['agreement']:.1%}")
            for name, q in schemes.items()
        ],
    )


def quality(found: Quality, pieces: int, numbers: list[str], names: list[str]) -> dict[str, Any]:
    schemes = {"none": found.now()}
    for number in numbers:
        schemes |= {f"{number} {'+'.join(COMBINED[name])}": found.of(number, COMBINED[name]) for name in names}
    show(schemes)
    size = -(-found.num_layers // pieces)
    sensitivity: dict[str, dict[str, float]] = {}
    for first in range(0, found.num_layers, size):
        end = min(first + size, found.num_layers)
        sensitivity[f"layers {first} to {end - 1}"] = {
            f"{number} {group}": found.of(number, (group,), first, end)["kl"]
            for number in numbers
            for group in ("mlp", "attention")
            if group in names
        }
    heads = next(iter(sensitivity.values())).keys()
    table(("KL", *heads), [(name, *(f"{kl:.6f}" for kl in row.values())) for name, row in sensitivity.items()])
    return {"tokens": found.tokens, "window": _WINDOW, "schemes": schemes, "sensitivity_kl": sensitivity}


def speed(a: argparse.Namespace, path: str) -> dict[str, Any]:
    served, batches = a.served, a.batches
    shapes = {f"decode batch {n}": [Part(128, 1)] * n for n in batches} | {f"prompt of {a.prompt}": [Part(0, a.prompt)]}
    settings = {"model": path, "dtype": a.dtype, "threads": a.threads, "num_blocks": 5 * max(batches) + 16}
    runners = {name: ModelRunner(EngineConfig.model_validate(settings | SERVED[name])) for name in served}
    times = timed(runners, shapes, a.repeats, a.steps)
    found: dict[str, Any] = {}
    for name, runner in runners.items():
        forward = runner.forward
        found[name] = {
            "path": runner.describe_path(),
            "weight_bytes": forward.held_bytes if isinstance(forward, NativeStack) else None,
            "shapes": {
                shape: {
                    "ms": median(ms),
                    "tokens_per_s": sum(p.tokens for p in shapes[shape]) / median(ms) * 1e3,
                    "ratio": median([plain / own for plain, own in zip(times[served[0]][shape], ms, strict=True)]),
                }
                for shape, ms in times[name].items()
            },
        }
    rows = [
        (
            name,
            "?" if row["weight_bytes"] is None else f"{row['weight_bytes'] / 1e6:.0f}",
            *(f"{s['tokens_per_s']:.0f} ({s['ratio']:.2f})" for s in row["shapes"].values()),
        )
        for name, row in found.items()
    ]
    table(("tokens/s (ratio)", "MB", *shapes), rows)
    return found


def timed(
    runners: dict[str, ModelRunner], shapes: dict[str, list[Part]], repeats: int, a_turn: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of steps, by runner and shape; all runners in turns, of so many steps each."""
    steps = {name: Steps(runner) for name, runner in runners.items()}
    times: dict[str, dict[str, list[float]]] = {name: {shape: [] for shape in shapes} for name in runners}
    for repeat in range(repeats + 1):
        for shape, parts in shapes.items():
            for name, its in steps.items():
                ms = median([its.ms(parts) for _ in range(a_turn)])
                if repeat:  # the first is not counted
                    times[name][shape].append(ms)
    return times


def kept(a: argparse.Namespace, path: str, judge: Quality) -> dict[str, Any]:
    """Of KV: quality, bytes, and steps at a context."""
    context, schemes = a.context, a.kept
    chunk, prompt = min(128, context), min(a.prompt, context)
    judged = {kv_dtype: judge.with_kv(kv_dtype) for kv_dtype in schemes}
    show(judged)
    shapes = {
        "decode": [Part(context - 1, 1)],
        "decode of 4": [Part(context - 1, 1)] * 4,
        f"a chunk of {chunk}": [Part(context - chunk, chunk)],
        f"prompt of {prompt}": [Part(0, prompt)],
    }
    settings = {"model": path, "dtype": a.dtype, "threads": a.threads, "num_blocks": 4 * -(-context // 32) + 4}
    settings["context_limit_tokens"] = context
    runners = {name: ModelRunner(EngineConfig.model_validate(settings | {"kv_dtype": name})) for name in schemes}
    times = timed(runners, shapes, a.repeats, a.steps)
    found: dict[str, Any] = {}
    for name, runner in runners.items():
        a_token = sum(group.growing_bytes for group in runner.facts.groups)
        found[name] = {
            "path": runner.describe_path(),
            "bytes_per_token": a_token,
            "handoff_bytes": -(-context // runner.block_tokens) * runner.block_tokens * a_token,
            "quality": judged[name],
            "shapes": {
                shape: {
                    "ms": median(ms),
                    "ratio": median([plain / own for plain, own in zip(times[schemes[0]][shape], ms, strict=True)]),
                }
                for shape, ms in times[name].items()
            },
        }
    table(
        ("ms (ratio)", "bytes a token", f"MB of {context}", *shapes),
        [
            (
                name,
                row["bytes_per_token"],
                f"{row['handoff_bytes'] / 1e6:.1f}",
                *(f"{s['ms']:.2f} ({s['ratio']:.2f})" for s in row["shapes"].values()),
            )
            for name, row in found.items()
        ],
    )
    return {"context": context, "tokens": judge.tokens, "schemes": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "quality", "speed", "kv"), default="all")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, for quality")
    parser.add_argument("--pieces", type=int, default=6, help="of the layers, for the sensitivity map")
    parser.add_argument("--dtype", default="bfloat16", help="for speed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--served", nargs="+", choices=tuple(SERVED), default=list(SERVED), help="the first is 1.00")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--kept", nargs="+", choices=KV, default=list(KV), help="KV; the first is 1.00")
    parser.add_argument("--context", type=int, default=4096, help="tokens, for steps with KV in 8 bits")
    parser.add_argument("--prompt", type=int, default=512, help="tokens, of the shape that is a prompt")
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--numbers", nargs="+", choices=NUMBERS, default=list(NUMBERS), help="for quality")
    parser.add_argument("--groups", nargs="+", choices=tuple(COMBINED), default=list(COMBINED), help="for quality")
    arguments = parse(
        parser,
        tokens=16,
        pieces=1,
        repeats=1,
        served=["none", "int4 all"],
        batches=[1],
        context=64,
        kept=["model", "int8"],
        prompt=64,
        steps=1,
        numbers=["int4"],
        groups=["attention"],
    )
    torch.set_num_threads(arguments.threads)
    path = str(resolve_model(arguments.model))
    a = arguments
    result: dict[str, Any] = {"threads": a.threads}
    judge = Quality(path, a.tokens) if a.what != "speed" else None
    if judge is not None and a.what in ("all", "quality"):
        result["quality"] = quality(judge, a.pieces, a.numbers, a.groups)
    if a.what in ("all", "speed"):
        result["speed"] = {"dtype": a.dtype, **speed(a, path)}
    if judge is not None and a.what in ("all", "kv"):
        result["kv"] = {"dtype": a.dtype, **kept(a, path, judge)}
    save("quantization" if a.what == "all" else f"quantization-{a.what}", result)


if __name__ == "__main__":
    main()
