"""The loads of benchmarks/scaling.py: what comes, and what the platform has."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scaling.observation import Pool
from scaling.weighing import Pair
from simulator.elastic import Platform
from simulator.traces import Trace, TraceRequest, at_rate, read, window

BUDGET = 12
START_S = 45.0


@dataclass(frozen=True)
class Case:
    name: str
    trace: Callable[[int, float], Trace]  # of a seed, and of how long
    duration_s: float
    platform: Platform = field(default_factory=lambda: Platform(((0.0, BUDGET),), START_S))
    changes: Sequence[float] = field(default_factory=tuple)  # when the load changes for good
    start: Pair = (2, 2)


def lengths(rng: random.Random, mean: float, spread: float, most: int) -> int:
    """Log-normal."""
    sigma = math.sqrt(math.log(1 + spread**2))
    return max(1, min(most, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))


def made(
    name: str, rate: Callable[[float], float], most: float, shape: Callable[[float], tuple[float, float]]
) -> Callable[[int, float], Trace]:
    """Poisson arrivals at a rate that changes; `shape(t)` are the mean lengths of prompt and answer."""

    def draw(seed: int, duration_s: float) -> Trace:
        rng = random.Random(f"{seed}/{name}")
        at, requests = 0.0, []
        while (at := at + rng.expovariate(most)) < duration_s:
            if rng.random() * most < rate(at):
                prompt, answer = shape(at)
                requests.append(TraceRequest(at, lengths(rng, prompt, 0.8, 32_000), lengths(rng, answer, 0.7, 8_000)))
        return Trace(name, requests)

    return draw


def bursts(t: float) -> float:
    """A minute of seven times the load, at irregular times."""
    return 20.0 if any(start <= t < start + 60.0 for start in (150, 370, 455, 700, 930, 1090)) else 3.0


def recorded(folder: Path, name: str, rate: float, requests: int) -> Callable[[int, float], Trace]:
    def draw(seed: int, duration_s: float) -> Trace:
        rng = random.Random(f"{seed}/trace")
        return at_rate(window(read(folder / name, rng), min(requests, round(duration_s * rate)), rng), rate)

    return draw


def cases(folder: Path) -> list[Case]:
    usual = (6000.0, 300.0)
    short = ((0.0, 6), (400.0, BUDGET))
    return [
        Case(
            "sine",
            made("sine", lambda t: 12.5 - 11.5 * math.cos(2 * math.pi * t / 900), 24.0, lambda _: usual),
            900.0,
            start=(1, 1),
        ),
        Case(
            "flip",
            made("flip", lambda _: 12.0, 12.0, lambda t: (10_000.0, 200.0) if t < 400 else (1500.0, 2000.0)),
            800.0,
            changes=(400.0,),
            start=(5, 2),
        ),
        Case(
            "no GPU to be had",
            made("no GPU", lambda t: 4.0 if t < 150 else 15.0, 15.0, lambda _: usual),
            700.0,
            Platform(short, START_S),
            (150.0, 400.0),
        ),
        Case(
            "death while shrinking",
            made("death", lambda t: 14.0 if t < 300 else 4.0, 14.0, lambda _: usual),
            600.0,
            Platform(((0.0, BUDGET),), START_S, deaths=((345.0, Pool.PREFILL), (370.0, Pool.DECODE))),
            (300.0,),
            (4, 3),
        ),
        Case("bursts", made("bursts", bursts, 20.0, lambda _: (4000.0, 250.0)), 800.0),
        Case("constant", made("constant", lambda _: 8.0, 8.0, lambda _: usual), 400.0),
        Case("mooncake x2", recorded(folder, "mooncake_conversation_0-30min.jsonl", 6.4, 2850), 440.0),
    ]
