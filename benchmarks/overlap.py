"""Overlapping steps against steps one after the other (engine.async_scheduling), on one machine in one run.

The whole engine thread takes part: a worker's core, its loop, its outbox; sequences decode side by side after short
prompts. The two modes take turns; figures are medians of tokens a second, and the ratio is of neighbouring runs.
"""

from __future__ import annotations

import argparse
import queue
import random
import statistics
import time

import torch

from benchmarks.report import median, parse, save, table
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.overlap import launcher_of
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams
from worker.core import WorkerCore
from worker.loop import StepLoop
from worker.messages import Outbox, RouterCommands, RouterConnected, StartSequence

_LINK = 1
_PROMPT_TOKENS = 32


def tokens_per_s(runner: ModelRunner, batch: int, new_tokens: int, *, overlap: bool) -> float:
    """From the first token of all to the last."""
    limits = EngineLimits(runner.block_tokens, 8192, 256, 256, 8192, runner.facts.vocab_size)
    core = WorkerCore(EngineCore(limits, BlockPool(runner.num_blocks)), report_every_s=0.1)
    outboxes: queue.SimpleQueue[Outbox] = queue.SimpleQueue()
    crashes: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    launcher = launcher_of("on" if overlap else "off", runner)
    loop = StepLoop(core, runner, outboxes.put, crashes.put, launcher=launcher)
    rng = random.Random(batch)
    prompts = [[rng.randrange(runner.facts.vocab_size) for _ in range(_PROMPT_TOKENS)] for _ in range(batch)]
    sampling = SamplingParams(max_tokens=new_tokens)
    loop.post(RouterConnected(_LINK))
    loop.post(RouterCommands(_LINK, tuple(StartSequence(i, f"r{i}", p, [], sampling) for i, p in enumerate(prompts))))
    loop.start()
    heard, begun, first = 0, 0.0, 0
    while heard < batch * new_tokens:
        output = outboxes.get(timeout=120).links.get(_LINK)
        heard += len(output.token_ids) if output is not None else 0
        if not begun and heard >= batch:
            begun, first = time.perf_counter(), heard
    took = time.perf_counter() - begun
    if not loop.stop(10):
        raise RuntimeError("the engine thread does not end")
    return (heard - first) / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parse(parser, batches=[2], new_tokens=4, repeats=1)
    config = {name: getattr(arguments, name) for name in ("model", "device", "kernels", "dtype", "threads")}
    runner = ModelRunner(EngineConfig.model_validate(config))
    rows, results = [], {}
    for batch in arguments.batches:
        found: dict[bool, list[float]] = {False: [], True: []}
        tokens_per_s(runner, batch, 4, overlap=False)
        for _ in range(arguments.repeats):
            for overlap in (False, True):
                found[overlap].append(tokens_per_s(runner, batch, arguments.new_tokens, overlap=overlap))
        ratios = [on / off for off, on in zip(found[False], found[True], strict=True)]
        off, on, ratio = median(found[False]), median(found[True]), median(ratios)
        spread = statistics.pstdev(ratios)
        rows.append((batch, f"{off:.1f}", f"{on:.1f}", f"{ratio:.3f}", f"{spread:.3f}"))
        results[str(batch)] = {"off": off, "on": on, "ratio": ratio, "ratio_deviation": spread}
    threads = torch.get_num_threads()
    table((f"{runner.forward.name}, {threads} threads, batch", "off tokens/s", "on", "ratio", "deviation"), rows)
    save(
        "overlap", {"model": runner.facts.name, "kernels": runner.forward.name, "threads": threads, "batches": results}
    )


if __name__ == "__main__":
    main()
