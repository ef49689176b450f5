"""A router's sequence on this worker, as the worker keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.grammar import Matcher
from worker.messages import Link, StartSequence
from worker.timeline import Timeline


@dataclass(slots=True)
class HostedSequence:
    """`engine_id` is the engine's own number for it."""

    link: Link
    start: StartSequence
    engine_id: int
    deadline: float | None
    timeline: Timeline
    emitted: list[int] = field(default_factory=list)
    matcher: Matcher | None = None
