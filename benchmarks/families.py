"""One small model of each family: prefill and decode beside transformers `generate`, and what their KV takes.

    python -m benchmarks.families                      # about ten minutes
    python -m benchmarks.families --only gpt-oss,Qwen3-MoE

Random weights (benchmarks/family_models.py), the same checkpoint, type, threads and prompts for both, in turns in one
run, medians; ratios are pair by pair within a repeat. Each has a process of its own, and waits for its threads as it
does when it is used alone: ours as `diptych up` starts workers (settings/processors.py), theirs as torch does. A family
that does not load is a row with the reason.

Prefill: one prompt of 512 tokens, and 32 of 64, to their first token. Decode: from one new token to N of them, behind
64 tokens of context, 1 and 32 at once.

On a machine in use the clock may be the process's own processor time, with one thread: --clock cpu --threads 1.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import Engine, Generate, Ours
from benchmarks.family_models import FAMILIES, WINDOW, Family, save_model
from benchmarks.report import median, parse, save, table
from engine.model_errors import ModelLoadError
from engine.types import SamplingParams, SequenceSpec
from kv_transfer.layout import FULL, Group, Rule
from settings.processors import THREAD_VARIABLES

CONTEXT = 64
POINTS = ("prefill 1 x 512", "prefill 32 x 64", "decode batch 1", "decode batch 32")
BLOCK = 32


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 8000) for _ in range(length)] for _ in range(count)]


Times = tuple[float, float]  # wall, and the process's processor time


def timed(engine: Engine, batch: list[list[int]], new_tokens: int) -> Times:
    begun = time.process_time()
    wall = engine.run(batch, new_tokens)
    return wall, time.process_time() - begun


def serve_theirs(pipe: Connection, path: str, dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    engine = Generate(path, dtype, None)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        pipe.send(timed(engine, *asked))


class Theirs:
    """transformers' `generate` in a process of its own."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def timed(self, batch: list[list[int]], new_tokens: int) -> Times:
        self._pipe.send((batch, new_tokens))
        return self._pipe.recv()


@contextlib.contextmanager
def theirs(path: str, dtype: str, threads: int) -> Iterator[Theirs]:
    context = multiprocessing.get_context("spawn")
    ours, other = context.Pipe()
    kept = {name: os.environ.pop(name) for name in THREAD_VARIABLES if name in os.environ}
    child = context.Process(target=serve_theirs, args=(other, path, dtype, threads), daemon=True)
    child.start()
    os.environ.update(kept)
    other.close()
    try:
        ours.recv()
        yield Theirs(ours)
        ours.send(None)
    finally:
        ours.close()
        child.join(10)
        child.terminate()


def took(engine: Engine | Theirs, batch: list[list[int]], new_tokens: int, clock: str) -> float:
    wall, cpu = engine.timed(batch, new_tokens) if isinstance(engine, Theirs) else timed(engine, batch, new_tokens)
    return wall if clock == "wall" else cpu


def seconds(engine: Engine | Theirs, point: str, repeat: int, new_tokens: int, clock: str) -> float:
    """A token. NaN when the machine was so disturbed that more tokens took less time."""
    if point.startswith("prefill"):
        count, length = (1, 512) if "512" in point else (32, 64)
        batches = [prompts(count, length, 100 * repeat + i) for i in range(2)]
        return median([took(engine, batch, 1, clock) for batch in batches]) / (count * length)
    size = int(point.rpartition(" ")[2])
    batch = prompts(size, CONTEXT, 1000 * size + repeat)
    more = took(engine, batch, new_tokens, clock) - took(engine, batch, 1, clock)
    return more / (new_tokens - 1) / size if more > 0 else math.nan


def compare(path: Path, arguments: argparse.Namespace) -> tuple[Ours, dict[str, Any]]:
    """Raises ModelLoadError."""
    ours = Ours(str(path), arguments.dtype, arguments.threads)
    times: dict[str, dict[str, list[float]]] = {name: {p: [] for p in POINTS} for name in (Ours.name, Generate.name)}
    with theirs(str(path), arguments.dtype, arguments.threads) as other:
        engines: dict[str, Engine | Theirs] = {Ours.name: ours, Generate.name: other}
        for engine in engines.values():
            took(engine, prompts(1, 512, 1), 2, arguments.clock)
            took(engine, prompts(32, CONTEXT, 1), 3, arguments.clock)
        for repeat in range(arguments.repeats):
            for point in POINTS:
                for name, engine in list(engines.items())[:: 1 if repeat % 2 == 0 else -1]:
                    times[name][point].append(seconds(engine, point, repeat, arguments.new_tokens, arguments.clock))
    rates = {name: {p: 1 / median(of[p]) for p in POINTS} for name, of in times.items()}
    pairs = {p: zip(times[Ours.name][p], times[Generate.name][p], strict=True) for p in POINTS}
    ratios = {p: median([b / a for a, b in pair]) for p, pair in pairs.items()}
    experts = ""
    if ours.runner.expert_load is not None:
        modules = ours.runner.expert_load.names
        experts = "; experts " + ", ".join(sorted(set(modules)))
    return ours, {
        "path": ours.runner.forward.name + experts,
        "tokens_per_s": rates,
        "ratio": ratios,
        "kv_bytes_per_token": sum(g.token_bytes for g in ours.runner.shape.groups),
        "groups": [f"{g.rule} x{len(g.layers)}" for g in ours.runner.shape.groups],
    }


def kv_of_windows(ours: Ours) -> dict[str, Any]:
    """A prompt of eight windows, computed in chunks: what it holds then, and what a decode worker would pull."""
    tokens, groups = 8 * WINDOW, ours.runner.shape.groups
    core = ours.core()
    free = [core.pool.free_in(n) for n in range(len(groups))]
    assert core.add(SequenceSpec(0, prompts(1, tokens, 5)[0], SamplingParams(max_tokens=4)), 0.0) is None
    for _ in range(1000):
        plan = core.schedule(0.0)
        assert plan is not None, "the prompt ended without a token"
        if core.commit(plan, ours.runner.execute(plan), 0.0).tokens:
            break
    held = sum(
        (before - core.pool.free_in(n)) * g.block_bytes(BLOCK)
        for n, (before, g) in enumerate(zip(free, groups, strict=True))
    )
    return {
        "prompt_tokens": tokens,
        "held_bytes": held,
        "handed_over_bytes": handed_over(groups, tokens),
        "bytes_without_windows": handed_over([replace(g, rule=without_window(g.rule)) for g in groups], tokens),
    }


def without_window(rule: Rule) -> Rule:
    return replace(FULL, values=rule.values) if rule.leaves else rule


def handed_over(groups: Any, tokens: int) -> int:
    def of(group: Group) -> int:
        return len(group.rule.needed(tokens, BLOCK)) * group.block_bytes(BLOCK)

    return sum(of(group) for group in groups)


def latent_bytes(path: Path, ours: Ours, dtype: str) -> dict[str, int] | None:
    """Of a token in the pool, and what keys and values of all heads would take."""
    from transformers import AutoConfig

    latent = [g for g in ours.runner.shape.groups if g.rule.values]
    if not latent:
        return None
    config = AutoConfig.from_pretrained(path)
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    layers = sum(len(g.layers) for g in latent)
    return {
        "pool": sum(g.token_bytes for g in latent),
        "compressed": layers * (config.kv_lora_rank + config.qk_rope_head_dim) * getattr(torch, dtype).itemsize,
        "expanded": layers * config.num_attention_heads * width * getattr(torch, dtype).itemsize,
    }


def measure(family: Family, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = save_model(family, Path(directory), arguments.dtype)
        try:
            ours, found = compare(path, arguments)
        except ModelLoadError as error:
            return {"refused": str(error).replace(directory, "the model")}
        if family.windowed:
            found["windows"] = kv_of_windows(ours)
        if latent := latent_bytes(path, ours, arguments.dtype):
            found["latent_bytes_per_token"] = latent
        return found


def line(f: dict[str, Any]) -> str:
    return f.get("refused") or ", ".join(f"{p} {ratio:.2f}" for p, ratio in f["ratio"].items())


def report(found: dict[str, dict[str, Any]]) -> None:
    measured = {name: f for name, f in found.items() if "refused" not in f}

    def cells(f: dict[str, Any]) -> list[str]:
        ours, theirs = f["tokens_per_s"][Ours.name], f["tokens_per_s"][Generate.name]
        return [f"{ours[p]:.0f} / {theirs[p]:.0f} = {f['ratio'][p]:.2f}" for p in POINTS]

    table(("tokens/s: ours / generate", *POINTS), [(name, *cells(f)) for name, f in measured.items()])
    table(("runs on", ""), [(name, f["path"]) for name, f in measured.items()])
    rows = [
        (name, w["prompt_tokens"], *(f"{w[k] / 1024:.0f} KiB" for k in _WINDOW_KEYS))
        for name, f in measured.items()
        if (w := f.get("windows"))
    ]
    table(("KV of a prompt of 8 windows", "tokens", "held", "handed over", "without windows"), rows)
    latent = [(name, *f[_LATENT].values()) for name, f in measured.items() if _LATENT in f]
    if latent:
        table(("latent KV, bytes a token", "in the pool", "compressed size", "expanded heads"), latent)
    for name, f in found.items():
        if "refused" in f:
            print(f"{name} does not load: {f['refused']}")


_WINDOW_KEYS = ("held_bytes", "handed_over_bytes", "bytes_without_windows")
_LATENT = "latent_bytes_per_token"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: the process's processor time")
    parser.add_argument("--only", default="", help="names of families, joined by commas; empty = all")
    arguments = parse(parser, repeats=1, new_tokens=3, only="Llama 3,gpt-oss,Qwen3-MoE,Falcon-H1")
    if not THREAD_VARIABLES.keys() <= os.environ.keys():  # they are read when torch is loaded
        again = [sys.executable, "-m", "benchmarks.families", *sys.argv[1:]]
        os.execve(sys.executable, again, THREAD_VARIABLES | os.environ)
    names = [family.name for family in FAMILIES]
    wanted = [name.strip() for name in arguments.only.split(",")] if arguments.only else names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"there is no family {unknown[0]}; there are {', '.join(names)}")
    torch.set_num_threads(arguments.threads)
    found: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        if family.name in wanted:
            found[family.name] = measure(family, arguments)
            print(f"{family.name}: {line(found[family.name])}", flush=True)
    report(found)
    save(
        "families",
        {
            "dtype": arguments.dtype,
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "clock": arguments.clock,
            "load_average_5_minutes": os.getloadavg()[1],  # above the threads: others computed meanwhile
            "families": found,
        },
    )


if __name__ == "__main__":
    main()
