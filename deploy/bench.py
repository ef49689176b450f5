"""`diptych bench`: concurrent load on a live cluster, and what its clients felt.

Prompts are synthetic (random token ids, a share of long ones), or a trace is replayed: its times, lengths and shared
prefixes (simulator/traces.py), scaled to what the machine can do. Every figure is measured at this client. Goodput
counts the requests that met both targets; errors are misses.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.clients import PLACEMENTS, Answer, RequestFailed, channel_to, generate, get_cluster, shuffled
from simulator.traces import Trace


@dataclass(frozen=True, slots=True)
class BenchPlan:
    requests: int
    concurrency: int
    short_tokens: int
    long_tokens: int
    long_share: float
    max_tokens: int
    ttft_target_ms: float
    itl_target_ms: float
    placement: str
    seed: int
    trace: str = ""  # replayed instead of synthetic prompts: where from, and how it was scaled


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send; `due_s` from the start, None: as soon as another one is done."""

    prompt: Sequence[int]
    max_tokens: int
    due_s: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    prompt_tokens: int
    tokens: int
    split: bool
    ttft_ms: float
    gaps_ms: tuple[float, ...]
    handoff_gap_ms: float
    total_ms: float
    error: str = ""


def synthetic(plan: BenchPlan) -> list[Job]:
    rng = random.Random(plan.seed)
    lengths = [plan.long_tokens if rng.random() < plan.long_share else plan.short_tokens for _ in range(plan.requests)]
    return [Job([rng.randrange(1000, 20000) for _ in range(length)], plan.max_tokens) for length in lengths]


def replay(trace: Trace) -> list[Job]:
    """Requests at the trace's times, with its lengths, and equal tokens where it says that prefixes are equal."""
    blocks: dict[int, list[int]] = {}

    def tokens(seed: str, count: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(1000, 20000) for _ in range(count)]

    jobs = []
    for number, r in enumerate(trace.requests):
        prompt: list[int] = []
        for block in r.blocks:
            if block not in blocks:
                blocks[block] = tokens(f"block {block}", trace.block_tokens)
            prompt += blocks[block]
        prompt += tokens(f"rest {number}", r.prompt_tokens - len(prompt))
        jobs.append(Job(prompt, r.output_tokens, r.arrival_s))
    return jobs


def run(
    target: str, plan: BenchPlan, jobs: Sequence[Job], on_done: Callable[[], None], timeout_s: float = 300.0
) -> dict[str, Any]:
    """Raises RequestFailed when the cluster cannot be reached at all.

    At most `plan.concurrency` requests are under way. One that was due earlier is late by our own fault: its time to
    first token counts from when it was due.
    """
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(channel_to(address)) for address in shuffled(target)]  # in turn
        model = get_cluster(channels[0], 5.0).router.model
        numbers = itertools.count()
        samples: list[Sample] = []
        started = time.monotonic()

        def work() -> None:
            while (number := next(numbers)) < len(jobs):
                job = jobs[number]
                due = None if job.due_s is None else started + job.due_s
                if due is not None:
                    time.sleep(max(0.0, due - time.monotonic()))
                samples.append(_one(channels[number % len(channels)], job, due, plan, timeout_s))
                on_done()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(plan.concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return summarise(plan, samples, time.monotonic() - started) | {"model": model, "target": target}


def _one(channel: Any, job: Job, due: float | None, plan: BenchPlan, timeout_s: float) -> Sample:
    from deploy.clients import generate_pb2

    prompt = job.prompt
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=prompt),
        placement=PLACEMENTS[plan.placement],
        sampling=generate_pb2.SamplingParams(max_tokens=job.max_tokens, ignore_eos=True),
    )
    answer = Answer()
    begun = time.monotonic()
    try:
        for _ in generate(channel, request, timeout_s, answer):
            pass
    except RequestFailed as error:
        return Sample(len(prompt), 0, False, 0.0, (), 0.0, (time.monotonic() - begun) * 1e3, f"{error.code}: {error}")
    times = answer.token_times
    came = answer.sent_at if due is None else min(due, answer.sent_at)
    gaps = tuple((b - a) * 1e3 for a, b in itertools.pairwise(times))
    return Sample(
        len(prompt),
        len(times),
        answer.split,
        (times[0] - came) * 1e3,
        gaps,
        answer.finished.timings.handoff_gap_ms,
        (times[-1] - came) * 1e3,
    )


def summarise(plan: BenchPlan, samples: Sequence[Sample], duration_s: float) -> dict[str, Any]:
    good = [s for s in samples if not s.error]
    met = [
        s
        for s in good
        if s.ttft_ms <= plan.ttft_target_ms and (not s.gaps_ms or statistics.fmean(s.gaps_ms) <= plan.itl_target_ms)
    ]
    split = [s for s in good if s.split]
    return {
        "plan": asdict(plan),
        "duration_s": duration_s,
        "requests": len(samples),
        "errors": len(samples) - len(good),
        "first_error": next((s.error for s in samples if s.error), ""),
        "split_share": len(split) / len(good) if good else 0.0,
        "ttft_ms": _quantiles([s.ttft_ms for s in good]),
        "itl_ms": _quantiles([g for s in good for g in s.gaps_ms]),
        "handoff_gap_ms": _quantiles([s.handoff_gap_ms for s in split]),
        "output_tokens_per_s": sum(s.tokens for s in good) / duration_s if duration_s else 0.0,
        "prompt_tokens_per_s": sum(s.prompt_tokens for s in good) / duration_s if duration_s else 0.0,
        "goodput_share": len(met) / len(samples) if samples else 0.0,
        "goodput_requests_per_s": len(met) / duration_s if duration_s else 0.0,
        "samples": [asdict(s) for s in samples],
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 90, 99)}


def write_report(result: dict[str, Any], directory: Path) -> list[Path]:
    """result.json, and latencies.png where matplotlib is installed (`pip install matplotlib`)."""
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "result.json"]
    written[0].write_text(json.dumps(result, indent=1))
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return written
    good = [s for s in result["samples"] if not s["error"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for split, label in ((True, "split"), (False, "local")):
        ttft = sorted(s["ttft_ms"] for s in good if s["split"] is split)
        gaps = sorted(g for s in good if s["split"] is split for g in s["gaps_ms"])
        for axis, values in ((axes[0], ttft), (axes[1], gaps)):
            if values:
                axis.plot(values, [(i + 1) / len(values) for i in range(len(values))], label=f"{label} ({len(values)})")
    for axis, title in ((axes[0], "time to first token"), (axes[1], "inter-token latency")):
        axis.set(title=title, xlabel="ms", ylabel="share of requests or gaps", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    written.append(directory / "latencies.png")
    figure.savefig(written[-1], dpi=110)
    pyplot.close(figure)
    return written
