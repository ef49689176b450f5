"""What a worker of several ranks pays: for telling the others a step, and for each sum between them.

Real processes, joined as a worker's are (engine/ranks), without a model: a step of `--batch` decodes with tables of
`--blocks` blocks is written, sent, read, and ends in one sum; then the same sum alone. With `--model` that checkpoint
is loaded besides, over 1 and over `--degree` ranks, and the most memory that each process held is said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.report import median, parse, save, table
from engine.attention.interface import Chunk
from engine.config import EngineConfig
from engine.ranks.group import Group, Stamps
from engine.ranks.link import Kind, receive, send
from engine.ranks.message import decode, encode
from engine.ranks.place import Place
from engine.runner import ModelRunner

_CPU = torch.device("cpu")
_BLOCK_TOKENS = 32


def follow(rank: int, degree: int, meeting: str, link: socket.socket, stamps: int, part: torch.Tensor) -> None:
    """STEP: read it, and take part in one sum. HELLO: in as many as it says."""
    group = Group(Place(rank, degree), meeting, Stamps(stamps, degree), _CPU)
    while (said := receive(link)) is not None:
        kind, content = said
        if kind is Kind.STEP:
            decode(content)
        for _ in range(1 if kind is Kind.STEP else int(content)):
            group.sum(part)


def costs(degree: int, batch: int, blocks: int, hidden: int, steps: int) -> dict[str, float]:
    """Medians, in microseconds."""
    torch.set_num_threads(1)
    part = torch.ones(batch, hidden)
    stamps = os.memfd_create("ranks")
    links: list[socket.socket] = []
    children: list[int] = []
    with tempfile.TemporaryDirectory() as directory:
        for rank in range(1, degree):
            ours, theirs = socket.socketpair()
            child = os.fork()  # nothing has been computed yet: there are no threads that would be missing
            if not child:
                for link in (ours, *links):
                    link.close()
                try:
                    follow(rank, degree, f"{directory}/ranks", theirs, stamps, part)
                finally:
                    os._exit(0)
            theirs.close()
            links.append(ours)
            children.append(child)
        group = Group(Place(0, degree), f"{directory}/ranks", Stamps(stamps, degree), _CPU)
        for link in links:
            send(link, Kind.HELLO, str(steps).encode())
        sums = timed(steps, lambda: group.sum(part))
        last = blocks * _BLOCK_TOKENS - 1
        chunks = [Chunk(i, 1, last, list(range(i * blocks, (i + 1) * blocks))) for i in range(batch)]
        told: list[float] = []

        def step() -> None:
            begun = time.perf_counter()
            message = encode([7] * batch, [last] * batch, chunks, range(batch))
            for link in links:
                send(link, Kind.STEP, message)
            told.append(time.perf_counter() - begun)
            group.sum(part)

        steps_took = timed(steps, step)
    for link in links:
        link.close()
    for child in children:
        os.waitpid(child, 0)
    os.close(stamps)
    skip = steps // 10
    tell_us, sum_us, step_us = (1e6 * median(found[skip:]) for found in (told, sums, steps_took))
    return {"tell_us": tell_us, "sum_us": sum_us, "over_one_sum_us": step_us - sum_us}


def timed(count: int, function: Callable[[], object]) -> list[float]:
    found: list[float] = []
    for _ in range(count):
        begun = time.perf_counter()
        function()
        found.append(time.perf_counter() - begun)
    return found


def held_mb(process: int | str) -> dict[str, float]:
    """The most that was resident, and what of it belongs to no file now."""
    status = Path(f"/proc/{process}/status").read_text()
    return {name: int(re.findall(rf"{name}:\s+(\d+)", status)[0]) / 1024 for name in ("VmHWM", "RssAnon")}


def hold(model: str, degree: int) -> None:
    """Prints what each rank of a worker held."""
    runner = ModelRunner(
        EngineConfig.model_validate({"model": model, "num_blocks": 16, "tensor_parallel": degree, "device": "cpu"})
    )
    ranks = [os.getpid(), *(runner.leader.processes if runner.leader is not None else [])]
    print(json.dumps([held_mb(process) for process in ranks]))
    runner.close()


def memory(model: str, degree: int) -> list[dict[str, float]]:
    """In processes of their own."""
    command = [sys.executable, "-m", "benchmarks.ranks", "--hold", "--model", model, "--degree", str(degree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--model", default="")
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    arguments = parse(parser, batch=[2], steps=20)
    if arguments.hold:
        hold(arguments.model, arguments.degree)
        return
    result: dict[str, object] = {"degree": arguments.degree, "blocks": arguments.blocks, "hidden": arguments.hidden}
    found = {
        n: costs(arguments.degree, n, arguments.blocks, arguments.hidden, arguments.steps) for n in arguments.batch
    }
    names = ("tell_us", "sum_us", "over_one_sum_us")
    table(
        (f"{arguments.degree} ranks, rows", "telling, us", "one sum, us", "a step beside its sum, us"),
        [(n, *(f"{costs[name]:.0f}" for name in names)) for n, costs in found.items()],
    )
    result["by_rows"] = {str(n): costs for n, costs in found.items()}
    if arguments.model:
        held = {degree: memory(arguments.model, degree) for degree in (1, arguments.degree)}
        table(
            ("ranks", "the most each held, MB", "of it in no file, MB"),
            [
                (n, ", ".join(f"{m['VmHWM']:.0f}" for m in each), ", ".join(f"{m['RssAnon']:.0f}" for m in each))
                for n, each in held.items()
            ],
        )
        result["memory_mb"] = {str(n): each for n, each in held.items()}
    save("ranks", result)


if __name__ == "__main__":
    main()
