"""When a traced sequence reached what, on this worker. Plain values; `worker/tracing.py` turns them into spans."""

from __future__ import annotations

from dataclasses import dataclass, field

# name, from mark, to mark: a phase is drawn when both marks are there.
_PHASES = (
    ("queue", "arrived", "started"),
    ("prefill", "started", "first_token"),
    ("transfer", "following", "adopted"),
    ("decode", "decoding", "ended"),
)


@dataclass(frozen=True, slots=True)
class Phase:
    """Seconds on the worker's own clock."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class SequenceTrace:
    request_id: str
    traceparent: str
    outcome: str
    start: float
    end: float
    phases: tuple[Phase, ...]


@dataclass(slots=True)
class Marks:
    times: dict[str, float] = field(default_factory=dict)

    def set(self, name: str, now: float) -> None:
        """The first time counts."""
        self.times.setdefault(name, now)

    def close(self, request_id: str, traceparent: str, outcome: str, now: float) -> SequenceTrace:
        times = self.times
        times["ended"] = now
        if "adopted" in times:
            times["decoding"] = times["adopted"]
            times.pop("started", None)  # nothing was computed here before
        elif "first_token" in times and outcome != "handed_over":
            times["decoding"] = times["first_token"]
        phases = tuple(
            Phase(name, times[start], times[end]) for name, start, end in _PHASES if start in times and end in times
        )
        return SequenceTrace(request_id, traceparent, outcome, times["arrived"], now, phases)
