"""Requests from public traces: when, how long, and which prefix blocks they share.

    mooncake   JSON lines: timestamp (ms), input_length, output_length, hash_ids (one per 512 tokens of the prompt)
    azure      CSV: TIMESTAMP, ContextTokens, GeneratedTokens; nothing is known of prefixes
    lengths    CSV: arrival_s, input_tokens, output_tokens
    servegen   JSON: clients with arrival processes and length quantiles; a generator

Mooncake's timestamps are quantised to 3 s: replayed raw, requests come in bursts that nobody sent. They are spread
uniformly inside their bin, from the seed, unless that is switched off.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MOONCAKE_BIN_S = 3.0
MOONCAKE_BLOCK_TOKENS = 512


class TraceError(ValueError):
    """A trace that cannot be read; says where and why."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`blocks`: a number above 0 per full block; equal numbers, equal prefix. Empty: nothing is shared."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    requests: Sequence[TraceRequest]
    block_tokens: int = MOONCAKE_BLOCK_TOKENS

    @property
    def duration_s(self) -> float:
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def requests_per_s(self) -> float:
        return (len(self.requests) - 1) / self.duration_s if self.duration_s > 0 else 0.0


def read(path: Path, rng: random.Random, *, jitter: bool = True) -> Trace:
    """Which format it is shows in its first line. Raises TraceError."""
    try:
        with path.open() as file:
            first = file.readline()
        if first.startswith("TIMESTAMP,"):
            return _read_azure(path)
        if first.startswith("arrival_s,"):
            return _read_lengths(path)
        if '"hash_ids"' in first or '"input_length"' in first:
            return _read_mooncake(path, rng, jitter)
        if '"clients"' in first:
            return servegen(json.loads(path.read_text()), path.stem, rng)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise TraceError(f"{path}: {error!r}; docs/simulator.md lists the formats") from None
    raise TraceError(f"{path}: no known trace format; docs/simulator.md lists the formats")


def _read_mooncake(path: Path, rng: random.Random, jitter: bool) -> Trace:
    requests = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        with _in_line(number):
            row = json.loads(line)
            at = row["timestamp"] / 1e3 + (rng.uniform(0, MOONCAKE_BIN_S) if jitter else 0.0)
            full = row["input_length"] // MOONCAKE_BLOCK_TOKENS
            names = tuple(h + 1 for h in row["hash_ids"][:full])
            requests.append(_request(at, row["input_length"], row["output_length"], names))
    return _sorted(path.stem, requests)


def _read_azure(path: Path) -> Trace:
    requests = []
    with path.open() as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            with _in_line(number):
                at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                requests.append(_request(at, row["ContextTokens"], row["GeneratedTokens"]))
    return _sorted(path.stem, requests)


def _read_lengths(path: Path) -> Trace:
    requests = []
    with path.open() as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            with _in_line(number):
                requests.append(_request(row["arrival_s"], row["input_tokens"], row["output_tokens"]))
    return _sorted(path.stem, requests)


@contextlib.contextmanager
def _in_line(number: int) -> Iterator[None]:
    """Names the line of what is wrong in it."""
    try:
        yield
    except (KeyError, ValueError, TypeError, IndexError) as error:
        missing = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise TraceError(f"line {number}: {missing}; mend or remove it (docs/simulator.md lists the formats)") from None


def _request(arrival_s: Any, prompt_tokens: Any, output_tokens: Any, blocks: tuple[int, ...] = ()) -> TraceRequest:
    """0 tokens count as one: recorded traces have such lines. Raises ValueError or TypeError."""
    at, prompt, output = float(arrival_s), int(prompt_tokens), int(output_tokens)
    if not math.isfinite(at) or prompt < 0 or output < 0:
        raise ValueError(f"arrival {at:g} s, {prompt} input and {output} output tokens are no request")
    return TraceRequest(at, max(1, prompt), max(1, output), blocks)


def servegen(data: dict[str, Any], name: str, rng: random.Random) -> Trace:
    """Draws requests: per client and window of the file, Gamma or Weibull gaps; lengths from its 64 quantiles."""
    requests = []
    for client in data["clients"]:
        windows = client["windows"]
        for i, (offset_s, rate, _cv, family, p1, p2) in enumerate(windows):
            if rate <= 0:
                continue
            end_s = windows[i + 1][0] if i + 1 < len(windows) else offset_s + 600.0
            at = offset_s
            while True:
                at += rng.gammavariate(p1, p2) if family == "Gamma" else rng.weibullvariate(p2, p1)
                if at >= end_s:
                    break
                requests.append(
                    TraceRequest(at, max(1, rng.choice(client["input_q64"])), max(1, rng.choice(client["output_q64"])))
                )
    return _sorted(name, requests)


def _sorted(name: str, requests: list[TraceRequest]) -> Trace:
    if not requests:
        raise ValueError("the trace has no requests")
    requests.sort(key=lambda r: r.arrival_s)
    start = requests[0].arrival_s
    return Trace(name, [replace(r, arrival_s=r.arrival_s - start) for r in requests])


def window(trace: Trace, count: int, rng: random.Random) -> Trace:
    """`count` consecutive requests from a random place; all, if there are not more."""
    if count >= len(trace.requests):
        return trace
    first = rng.randrange(len(trace.requests) - count + 1)
    part = trace.requests[first : first + count]
    start = part[0].arrival_s
    return replace(trace, requests=[replace(r, arrival_s=r.arrival_s - start) for r in part])


def at_rate(trace: Trace, requests_per_s: float) -> Trace:
    """The same requests, faster or slower. A cached prefix then lives shorter or longer in requests, too."""
    factor = trace.requests_per_s / requests_per_s if trace.requests_per_s else 1.0
    return replace(trace, requests=[replace(r, arrival_s=r.arrival_s * factor) for r in trace.requests])


def shortened(trace: Trace, factor: float) -> Trace:
    """Lengths divided by `factor`; for machines that are slower than those the trace is from."""
    if factor == 1:
        return trace
    block = max(1, round(trace.block_tokens / factor))

    def short(r: TraceRequest) -> TraceRequest:
        prompt = max(1, math.ceil(r.prompt_tokens / factor))
        return replace(
            r,
            prompt_tokens=prompt,
            output_tokens=max(1, math.ceil(r.output_tokens / factor)),
            blocks=r.blocks[: prompt // block],
        )

    return replace(trace, requests=[short(r) for r in trace.requests], block_tokens=block)


def repeated(trace: Trace, count: int) -> Trace:
    """At least so many requests, by playing the trace over and over; every round has prefixes of its own."""
    requests: list[TraceRequest] = []
    names = max((max(r.blocks) for r in trace.requests if r.blocks), default=0)
    pause = trace.duration_s + (1 / trace.requests_per_s if trace.requests_per_s else 1.0)
    round_number = 0
    while len(requests) < count:
        shift, offset = round_number * pause, round_number * names
        requests += [
            replace(r, arrival_s=r.arrival_s + shift, blocks=tuple(b + offset for b in r.blocks))
            for r in trace.requests[: count - len(requests)]
        ]
        round_number += 1
    return replace(trace, requests=requests)
