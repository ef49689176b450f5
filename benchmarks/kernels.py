"""Where a step of the native stack goes: milliseconds a phase, TFLOP/s of its products, GB/s of its weights.

    python -m benchmarks.kernels            # about two minutes
    python -m benchmarks.kernels --levels avx512-bf16,vectors --threads 1

Steps of given shapes straight into the runner, in turns over the repeats, medians. Beside them in the same turns: what
reading memory gives (benchmarks/ceilings.py), what torch's own product of two 2048 x 2048 matrices reaches, and the
same steps with the threads left to the operating system (engine.pin_threads: off). "rest" is what a step takes outside
the kernels: planning, packing, sampling. Phases are processor time of the first thread, which spins where it waits.

Then the share of the products' peak (benchmarks/ceilings.py: registers only) that a prompt of 512 reaches, by product,
for every instruction set that the processor has: the kernels are held down as in the tests (DIPTYCH_NATIVE_ISA).
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
import torch

from benchmarks.ceilings import ProductPeak, ReadBandwidth
from benchmarks.report import median, parse, save, table
from benchmarks.steps import Part, Steps
from engine.config import EngineConfig
from engine.native.build import ISA_VARIABLE, LEVELS, runs_here
from engine.native.library import load_library
from engine.native.processors import chosen
from engine.native.stack import PHASES, NativeStack
from engine.runner import ModelRunner
from settings.model_path import resolve_model

SHAPES = {
    "prompt of 128": [Part(0, 128)],
    "prompt of 512": [Part(0, 512)],
    "decode batch 1": [Part(128, 1)],
    "decode batch 8": [Part(128, 1)] * 8,
    "decode batch 32": [Part(128, 1)] * 32,
    "decode batch 1 at 2048": [Part(2048, 1)],
}


class Work:
    """What a step multiplies and reads, by phase, from the model's configuration."""

    def __init__(self, config: Any, head_dim: int, item_bytes: int) -> None:
        c = config
        heads, kv_heads, layers = c.num_attention_heads, c.num_key_value_heads, c.num_hidden_layers
        self._attention = 4 * heads * head_dim * layers
        self.weights = {
            "qkv": layers * c.hidden_size * (heads + 2 * kv_heads) * head_dim,
            "out": layers * heads * head_dim * c.hidden_size,
            "gate_up": layers * 2 * c.hidden_size * c.intermediate_size,
            "down": layers * c.hidden_size * c.intermediate_size,
            "head": c.hidden_size * c.vocab_size,
        }
        self.weight_bytes = sum(self.weights.values()) * item_bytes

    def flops(self, phase: str, parts: list[Part]) -> float:
        tokens = sum(part.tokens for part in parts)
        if phase == "attention":
            return self._attention * sum(part.tokens * (part.start + (part.tokens + 1) / 2) for part in parts)
        return 2.0 * self.weights[phase] * (len(parts) if phase == "head" else tokens)


def matmul_tflops(dtype: torch.dtype, size: int = 2048) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    with torch.inference_mode():
        torch.mm(a, b)
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times) / 1e12


def measure(runner: ModelRunner, threads: int, repeats: int, shapes: dict[str, list[Part]]) -> dict[str, Any]:
    stack = runner.forward
    if not isinstance(stack, NativeStack):
        raise SystemExit(f"the model runs on {stack.name}, not on the native stack; this benchmark is about that one")
    work = _work(runner)
    dtype: torch.dtype = getattr(torch, runner.shape.groups[0].dtype)
    steps, reader = Steps(runner), ReadBandwidth(work.weight_bytes, threads)
    times: dict[str, list[np.ndarray]] = {name: [] for name in shapes}  # step, then phases; ms
    unpinned: dict[str, list[float]] = {name: [] for name in shapes}
    reads, products = [], []
    for parts in shapes.values():
        steps.ms(parts)
    for _ in range(repeats):
        load_library(threads, chosen("off", threads))
        for name, parts in shapes.items():
            unpinned[name].append(median([steps.ms(parts) for _ in range(3)]))
        load_library(threads, chosen("auto", threads))
        reads.append(reader.bytes_per_s() / 1e9)
        products.append(matmul_tflops(dtype))
        for name, parts in shapes.items():
            for _ in range(3):
                stack.seconds = np.zeros(len(PHASES))
                whole = steps.ms(parts)
                times[name].append(np.array([whole, *(stack.seconds * 1e3)]))
            stack.seconds = None

    read, product = median(reads), median(products)
    found: dict[str, Any] = {
        "read_gb_per_s": read,
        "weight_bytes": work.weight_bytes,
        "torch_matmul_2048_tflops": product,
        "steps": {},
    }
    rows = []
    for name, parts in shapes.items():
        whole, *phases = np.median(np.array(times[name]), axis=0).tolist()
        ms: dict[str, float] = dict(zip(PHASES, phases, strict=True))
        products_ms = sum(ms[p] for p in work.weights)
        rates = {p: work.flops(p, parts) / ms[p] / 1e9 for p in (*work.weights, "attention")}
        together = sum(work.flops(p, parts) for p in work.weights) / products_ms / 1e9
        share = work.weight_bytes / (read * 1e6) / whole
        found["steps"][name] = {
            "step_ms": whole,
            "unpinned_step_ms": median(unpinned[name]),
            "phases_ms": {**ms, "rest": whole - sum(phases)},
            "tflops": rates,
            "products_tflops": together,
            "weights_over_read_ceiling": share,
        }
        cells = (whole, median(unpinned[name]), *phases, whole - sum(phases))
        rows.append(
            (name, *(f"{c:.1f}" for c in cells), f"{together:.2f}", f"{rates['attention']:.2f}", f"{share:.0%}")
        )
    table(("ms", "step", "unpinned", *PHASES, "rest", "TFLOP/s", "attention", "of read"), rows)
    print(f"read {read:.1f} GB/s, torch's product {product:.2f} TFLOP/s, weights {work.weight_bytes / 1e6:.0f} MB")
    return found


def _work(runner: ModelRunner) -> Work:
    from transformers import AutoConfig

    (group,) = runner.shape.groups  # the stack serves no others
    config = AutoConfig.from_pretrained(str(resolve_model("embedded"))).get_text_config()
    return Work(config, group.width, getattr(torch, group.dtype).itemsize)


PROMPT = "prompt of 512"


def shares(dtype: str, threads: int, repeats: int) -> dict[str, Any]:
    """Of a prompt: GFLOP/s of each product, and the share of the products' peak, at the level in force."""
    runner = _runner(dtype, threads)
    stack, steps, parts = runner.forward, Steps(runner), SHAPES[PROMPT]
    assert isinstance(stack, NativeStack)
    work = _work(runner)
    steps.ms(parts)
    peaks, seconds = [], []
    for _ in range(repeats):
        peaks.append(ProductPeak(getattr(torch, dtype), threads).flops_per_s())
        stack.seconds = np.zeros(len(PHASES))
        steps.ms(parts)
        seconds.append(stack.seconds)
        stack.seconds = None
    peak = max(peaks)
    phases: dict[str, float] = dict(zip(PHASES, np.median(np.array(seconds), axis=0).tolist(), strict=True))
    products = [p for p in work.weights if p != "head"]  # of the prompt's last token only
    rates = {p: work.flops(p, parts) / phases[p] for p in (*products, "attention")}
    rates["all products"] = sum(work.flops(p, parts) for p in products) / sum(phases[p] for p in products)
    return {
        "peak_gflops": peak / 1e9,
        "gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "share_of_peak": {name: rate / peak if peak else None for name, rate in rates.items()},
    }


def _with_share(rate: float, share: float | None) -> str:
    return f"{rate:.0f}" if share is None else f"{rate:.0f} ({share:.0%})"


def _runner(dtype: str, threads: int) -> ModelRunner:
    settings = {"model": "embedded", "dtype": dtype, "threads": threads, "num_blocks": 400}
    return ModelRunner(EngineConfig.model_validate(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--levels", default=",".join(level for level in LEVELS if runs_here(level)))
    arguments = parse(parser, repeats=1, dtypes="bfloat16", shapes="prompt of 128,decode batch 8")
    shapes = {name: SHAPES[name] for name in arguments.shapes.split(",")}
    results: dict[str, Any] = {}
    for dtype in arguments.dtypes.split(","):
        runner = _runner(dtype, arguments.threads)
        print(f"{dtype}, {runner.forward.name}, {arguments.threads} threads")
        results[dtype] = {
            "forward": runner.forward.name,
            **measure(runner, arguments.threads, arguments.repeats, shapes),
        }
        del runner
        levels = results[dtype]["levels"] = {}
        before = os.environ.get(ISA_VARIABLE)
        for level in arguments.levels.split(","):
            os.environ[ISA_VARIABLE] = level
            levels[level] = shares(dtype, arguments.threads, arguments.repeats)
        os.environ.pop(ISA_VARIABLE)
        if before is not None:
            os.environ[ISA_VARIABLE] = before
        names = list(next(iter(levels.values()))["gflops"])
        print(f"{dtype}, {PROMPT}: GFLOP/s and share of the products' peak")
        table(
            ("level", "peak", *names),
            [
                (
                    level,
                    f"{found['peak_gflops']:.0f}",
                    *(_with_share(found["gflops"][n], found["share_of_peak"][n]) for n in names),
                )
                for level, found in levels.items()
            ],
        )
    load = os.getloadavg()[1]
    save("kernels", {"threads": arguments.threads, "load_average_5_minutes": load, **results})


if __name__ == "__main__":
    main()
