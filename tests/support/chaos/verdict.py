"""Every answer against the undisturbed one; every other end against its deadline."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.support.chaos.cases import SPLIT, Answer
from tests.support.chaos.clients import GRACE_S, Attempt
from tests.support.chaos.faults import Injected

HONEST_CODES = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
RETRYABLE = {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}


@dataclass
class Verdict:
    wrong: list[str] = field(default_factory=list)  # tokens, text or end differ from the undisturbed answer
    positions: list[str] = field(default_factory=list)  # duplicates and gaps
    late: list[str] = field(default_factory=list)  # ended after deadline and grace, or never
    dishonest: list[str] = field(default_factory=list)  # no message, an unexpected code, no retry hint
    rows: list[tuple[object, ...]] = field(default_factory=list)
    recovery_ms: dict[str, list[float]] = field(default_factory=dict)
    complete: int = 0
    went_on: int = 0  # elsewhere, by no fault
    errors: dict[str, int] = field(default_factory=dict)

    def problems(self) -> list[str]:
        kinds = {"WRONG": self.wrong, "POSITIONS": self.positions, "LATE": self.late, "DISHONEST": self.dishonest}
        return [f"{kind} {line}" for kind, lines in kinds.items() for line in lines]


HEADER = (
    "fault", "injected", "complete", "moved", "errors", "cancelled", "wrong", "dup/gap", "late",
    "recovery p50 ms", "p99 ms",
)  # fmt: skip


def judge(attempts: Sequence[Attempt], injected: Sequence[Injected], answers: Mapping[str, Answer]) -> Verdict:
    verdict = Verdict()
    by_kind: dict[str, list[Attempt]] = {"(none yet)": []} | {i.fault.kind: [] for i in injected}
    for attempt in attempts:
        last = max(
            (i for i in injected if i.at <= (attempt.ended or time.monotonic())), key=lambda i: i.at, default=None
        )
        by_kind[last.fault.kind if last else "(none yet)"].append(attempt)
        _judge_one(attempt, answers[attempt.case.name], verdict, f"[{last.fault if last else 'no fault'}] {attempt}")
    for one in injected:
        verdict.recovery_ms.setdefault(one.fault.kind, []).extend(
            recovery_ms(attempts, one.victim or one.fault.target, one.at)
        )
    for kind, mine in by_kind.items():
        marks = [len([1 for line in lines if _of_kind(line, kind)]) for lines in
                 (verdict.wrong, verdict.positions, verdict.late)]  # fmt: skip
        times = sorted(verdict.recovery_ms.get(kind, []))
        verdict.rows.append(
            (
                kind,
                sum(i.fault.kind == kind for i in injected),
                sum(a.outcome == "complete" for a in mine),
                sum(bool(a.finished and a.finished.recoveries) for a in mine),
                sum(a.outcome == "error" for a in mine),
                sum(a.outcome == "cancelled" for a in mine),
                *marks,
                f"{percentile(times, 50):.0f}" if times else "",
                f"{percentile(times, 99):.0f}" if times else "",
            )
        )
    return verdict


def _of_kind(line: str, kind: str) -> bool:
    return line.startswith(f"[{kind if kind != '(none yet)' else 'no fault'}")


def _judge_one(attempt: Attempt, answer: Answer, verdict: Verdict, line: str) -> None:
    got = tuple(attempt.token_ids)
    if attempt.outcome == "complete":
        verdict.complete += 1
        finished, route = attempt.finished, attempt.route
        verdict.went_on += not finished.recoveries and finished.route.decode_worker != route.decode_worker
        if got != answer.token_ids or attempt.text != answer.text or attempt.finished.reason != answer.reason:
            verdict.wrong.append(f"{line}\n   got      {got}\n   expected {answer.token_ids}")
        elif attempt.logprobs != (len(got) if attempt.case.sampling.HasField("logprobs") else 0):
            verdict.wrong.append(f"{line}\n   got log-probabilities of {attempt.logprobs} tokens")
    elif got != answer.token_ids[: len(got)]:
        verdict.wrong.append(f"{line}\n   got      {got}\n   expected {answer.token_ids}")
    if attempt.wrong_positions:
        verdict.positions.append(line)
    end = attempt.ended or time.monotonic()
    if not attempt.outcome or end - attempt.started > attempt.deadline_s + GRACE_S + attempt.excused_s:
        verdict.late.append(line)
    if attempt.outcome == "error":
        verdict.errors[attempt.code] = verdict.errors.get(attempt.code, 0) + 1
        in_vain = "allow more time, or ask for fewer tokens" in attempt.message  # it would be late whenever it came
        hinted = not attempt.from_server or attempt.code not in RETRYABLE or attempt.retry_after_ms > 0 or in_vain
        # A router that has just started may not know the prefill workers yet: an answer to who insists on them.
        insisted = attempt.code == "FAILED_PRECONDITION" and attempt.case.placement == SPLIT
        by_chance = attempt.code == "INTERNAL" and "running on two workers that crashed" in attempt.message
        if not (attempt.code in HONEST_CODES or insisted or by_chance) or not attempt.message or not hinted:
            verdict.dishonest.append(f"{line} (retry after {attempt.retry_after_ms} ms)")


def recovery_ms(attempts: Sequence[Attempt], worker: str, at: float) -> list[float]:
    """Fault to the next token, of every request that was on the worker then and went on elsewhere."""
    times: list[float] = []
    if not worker:
        return times
    for attempt in attempts:
        on_it = attempt.route is not None and worker in (attempt.route.decode_worker, attempt.route.prefill_worker)
        if not (on_it and attempt.finished is not None and attempt.finished.recoveries):
            continue
        after = [t for t in attempt.arrivals if t > at]
        if attempt.started <= at < attempt.ended and after:
            times.append((after[0] - at) * 1e3)
    return times


def percentile(values: Sequence[float], percent: float) -> float:
    """Of sorted values; the nearest rank."""
    if not values:
        return float("nan")
    return values[min(len(values) - 1, max(0, -(-int(percent * len(values)) // 100) - 1))]
