"""Long contexts: what a token of context costs a decode, against reading its KV once; and prefill's quadratic part.

A model of the embedded one's shape with random weights and 32k positions, made for the run: its own limit is 8k, and
what attention costs does not depend on the weights. Decode steps at 1k, 4k and 16k in turns, medians; the slope of a
line through them in ns per token of context, and the same for reading KV at the bandwidth measured beside it. One
prompt of 16k in chunks of 512, and seconds(n) = a + b n + c n^2 fitted to its running time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ceilings import ReadBandwidth
from benchmarks.report import median, parse, save, table
from benchmarks.steps import Part, Steps
from engine.config import EngineConfig
from engine.runner import ModelRunner
from settings.model_path import resolve_model

CONTEXTS = (1024, 4096, 16384)
CHUNK = 512


def same_shape(model: Path, directory: Path, positions: int) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    target = directory / "long"
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": positions}
    (target / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target), dtype=torch.bfloat16).save_pretrained(target)
    return target


def decode(steps: Steps, batches: tuple[int, ...], repeats: int, kv_bytes: int, threads: int) -> dict[str, Any]:
    reader = ReadBandwidth(kv_bytes * max(CONTEXTS), threads)
    times: dict[tuple[int, int], list[float]] = {(b, c): [] for b in batches for c in CONTEXTS}
    bandwidths = []
    for _ in range(repeats):
        bandwidths.append(reader.bytes_per_s(3))
        for (batch, context), found in times.items():
            found.append(median([steps.ms([Part(context, 1)] * batch) for _ in range(3)]))
    limit_ns = kv_bytes / median(bandwidths) * 1e9
    result: dict[str, Any] = {"read_gb_per_s": median(bandwidths) / 1e9, "limit_ns_per_context_token": limit_ns}
    rows = []
    for batch in batches:
        ms = [median(times[batch, c]) for c in CONTEXTS]
        # Medians of slopes within a repeat: a machine that changes speed does not bend the line.
        slopes = [
            np.polyfit([batch * c for c in CONTEXTS], [times[batch, c][i] for c in CONTEXTS], 1)[0] * 1e6
            for i in range(repeats)
        ]
        slope = median(slopes)
        result[f"batch {batch}"] = {
            "ms_a_step": dict(zip(map(str, CONTEXTS), ms, strict=True)),
            "slope_ns_per_context_token": slope,
            "limit_over_slope": limit_ns / slope,
        }
        rows.append((f"decode batch {batch}", *(f"{t:.1f}" for t in ms), f"{slope:.0f}", f"{limit_ns / slope:.0%}"))
    table(("ms a step", *(f"at {c}" for c in CONTEXTS), "ns/token", "of the read limit"), rows)
    print(f"reading a token's KV once: {limit_ns:.0f} ns at {median(bandwidths) / 1e9:.1f} GB/s")
    return result


def prefill(steps: Steps, repeats: int, longest: int) -> dict[str, Any]:
    starts = range(0, longest, CHUNK)
    passes = [[steps.ms([Part(start, CHUNK)]) / 1e3 for start in starts] for _ in range(repeats)]
    chunks = np.median(np.array(passes), axis=0)
    lengths, total = np.array([s + CHUNK for s in starts]), np.cumsum(chunks)
    # Relative, so that short prompts count as much as long ones.
    x = np.stack([np.ones_like(total), lengths, lengths**2.0], axis=1)
    a, b, c = np.linalg.lstsq(x / total[:, None], np.ones_like(total), rcond=None)[0]
    error = float(np.median(np.abs(x @ [a, b, c] - total) / total))
    shown = [n for n in (*CONTEXTS, longest) if n <= longest]
    seconds = {str(n): float(total[n // CHUNK - 1]) for n in shown}
    share = {str(n): float(c * n * n / (a + b * n + c * n * n)) for n in shown}
    table(("prompt", "seconds", "quadratic part"), [(n, f"{seconds[n]:.2f}", f"{share[n]:.0%}") for n in seconds])
    print(f"seconds(n) = {a:.3g} + {b * 1e6:.1f}e-6 n + {c * 1e9:.2f}e-9 n^2, median error {error:.1%}")
    return {"a_s": a, "b_s": b, "c_s": c, "median_relative_error": error, "seconds": seconds, "quadratic_share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prefill-repeats", type=int, default=2)
    parser.add_argument("--longest-prompt", type=int, default=max(CONTEXTS), help="tokens; a multiple of 512")
    arguments = parse(parser, repeats=1, prefill_repeats=1, longest_prompt=2048)
    with tempfile.TemporaryDirectory(prefix="long-context-") as directory:
        path = same_shape(Path(resolve_model(arguments.model)), Path(directory), 2 * max(CONTEXTS))
        settings = {"model": str(path), "dtype": "bfloat16", "threads": arguments.threads, "block_tokens": 32}
        blocks = 4 * (max(CONTEXTS) // 32 + 1)
        runner = ModelRunner(EngineConfig.model_validate({**settings, "num_blocks": blocks}))
        steps = Steps(runner)
        for _ in range(2):
            steps.ms([Part(max(CONTEXTS), 1)] * 4)
            steps.ms([Part(CHUNK, CHUNK)])
        found = decode(steps, (1, 4), arguments.repeats, runner.block_bytes // runner.block_tokens, arguments.threads)
        quadratic = prefill(steps, arguments.prefill_repeats, arguments.longest_prompt)
    save("long_context", {"threads": arguments.threads, "decode": found, "prefill": quadratic})


if __name__ == "__main__":
    main()
