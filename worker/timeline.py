"""When a sequence reached what, on this worker: what its first token waited for, and, if it is traced, its phases.

    received ──(held: waits for KV from elsewhere)──> runnable ──(queue)──> started ──(steps)──> sampled ... ended

Plain values on the worker's own clock; only durations leave it. `worker/tracing.py` turns traces into spans.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_MAX_CHUNKS = 64  # told one by one in a trace


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step's part of a prompt. `at`: its end."""

    at: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Phase:
    """Seconds on the worker's own clock."""

    name: str
    start: float
    end: float
    chunks: tuple[Chunk, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceTrace:
    request_id: str
    traceparent: str
    outcome: str
    start: float
    end: float
    phases: tuple[Phase, ...]
    leg: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FirstStep:
    """What the first token sampled here waited for: received to `sampled_at` is the sum of the durations.

    `sampled_at` stays on this worker: how long the token waits for its way out is known only when it leaves.
    """

    sequence_id: int
    held_s: float
    queue_s: float
    prefill_s: float  # in steps that computed this sequence
    prefill_wait_s: float  # between such steps: it gave way, or the step's budget was others'
    sampled_at: float


@dataclass(slots=True)
class Timeline:
    received: float
    runnable: float | None = None
    started: float | None = None
    computed_s: float = 0.0
    sampled: float | None = None
    announced: float | None = None  # a reader's first announcement
    final_at: float | None = None  # its last one
    adopted: float | None = None
    chunks: list[Chunk] = field(default_factory=list)

    def step(self, started: float, ended: float, tokens: int) -> None:
        """A step computed some of it, and it has no token of its own yet."""
        if self.started is None:
            self.started = started
        self.computed_s += ended - started
        if len(self.chunks) < _MAX_CHUNKS:
            self.chunks.append(Chunk(ended, tokens))

    def first_step(self, sequence_id: int, now: float) -> FirstStep:
        self.sampled = now
        runnable = self.received if self.runnable is None else max(self.runnable, self.received)
        started = now if self.started is None else max(self.started, runnable)
        return FirstStep(
            sequence_id=sequence_id,
            held_s=runnable - self.received,
            queue_s=started - runnable,
            prefill_s=self.computed_s,
            prefill_wait_s=max(0.0, now - started - self.computed_s),
            sampled_at=now,
        )

    def phases(self, handed_over: bool, ended: float) -> tuple[Phase, ...]:
        """What happened of: queue, prefill, transfer (from the first announcement), adopt, decode."""
        found: list[Phase] = []
        if self.announced is not None:
            found.append(Phase("transfer", self.announced, ended if self.adopted is None else self.adopted))
        computed_until = ended if self.sampled is None else self.sampled
        if self.adopted is not None:
            if self.final_at is not None:
                found.append(Phase("adopt", self.final_at, self.adopted))
            found.append(Phase("decode", self.adopted, ended))
        elif self.started is not None:
            runnable = self.received if self.runnable is None else self.runnable
            found.append(Phase("queue", runnable, max(runnable, self.started)))
            found.append(Phase("prefill", self.started, computed_until, tuple(self.chunks)))
            if self.sampled is not None and not handed_over:
                found.append(Phase("decode", self.sampled, ended))
        elif self.announced is None:
            found.append(Phase("queue", self.received, ended))
        return tuple(found)
