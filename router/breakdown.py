"""Where a request's time to first token went, in parts that sum to it.

    router   arrived ─admission─> admitted ─decide─> dispatched ─recovery─> the leg that answers starts ─network─>
    worker   received ─(held)─worker_queue─> first step ─prefill, prefill_wait─> sampled ─worker_send─> written
    router   ─network─> first token

The router's own moments are of one clock. Of the worker only durations are known: what they leave of the time between
dispatch and first token is `network`, both ways together. Clocks of two machines are never compared.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kv_transfer.handoff import Acceptance
from router.placement.mixing import Mixing
from router.placement.view import WorkerKey
from settings.telemetry.catalog import TTFT_PARTS

DONE, UNDER_WAY = "done", "under way"


class RecoveryKind(enum.StrEnum):
    """What was done after a fault."""

    ANOTHER_SOURCE = "another_source"
    ANOTHER_READER = "another_reader"
    COMPUTED_REST = "computed_rest"
    PLACED_ANEW = "placed_anew"


@dataclass(frozen=True, slots=True)
class FirstStep:
    """What the first token that a worker sampled for a leg waited for there; fields as FirstStep in worker.proto."""

    held_ms: float
    queue_ms: float
    prefill_ms: float
    prefill_wait_ms: float
    send_ms: float


@dataclass(slots=True)
class Recovery:
    """`until`: the next token came; None: none did."""

    kind: RecoveryKind
    at: float
    until: float | None = None


@dataclass(slots=True)
class Migration:
    """A running answer that goes from one worker to another. `outcome`: "under way", "done" or why it stayed.
    `pause_s`: between the last token of the one and the first of the other; None: there was none yet.
    """

    source: WorkerKey
    target: WorkerKey
    why: str
    at: float
    outcome: str = UNDER_WAY
    frozen_at: float | None = None
    adopted_at: float | None = None
    pause_s: float | None = None
    pulled_bytes: int = 0

    @property
    def done(self) -> bool:
        return self.outcome == DONE

    @property
    def over(self) -> bool:
        """And, if it is done, its pause is known."""
        return self.pause_s is not None if self.done else self.outcome != UNDER_WAY


@dataclass(frozen=True, slots=True)
class Drafts:
    """What speculation did for a request; fields as Speculation in generate.proto."""

    verifications: int
    drafts: int
    accepted: int


_NOTHING = FirstStep(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(slots=True)
class Breakdown:
    """Written by the request's Life and the dispatcher. Times are absolute, of the clock that `now` comes from."""

    admitted: float | None = None
    legs: dict[int, float] = field(default_factory=dict)  # when each was started
    recoveries: list[Recovery] = field(default_factory=list)
    migrations: list[Migration] = field(default_factory=list)
    gap_step_ms: float = 0.0  # adopted to second token sampled, by the reader
    pulled_bytes: int = 0
    transfer_ms: float = 0.0
    mix: Mixing = field(default_factory=Mixing)
    drafts: dict[int, Drafts] = field(default_factory=dict)  # by leg
    acceptance: Acceptance | None = None  # of its drafts, as a worker has said it last
    recovering: bool = False  # the next token ends a recovery, or the pause of a migration
    _first: tuple[int, FirstStep] | None = None

    def drafted(self, leg: int, said: Drafts, acceptance: Acceptance | None) -> None:
        """A worker's word on a leg so far."""
        self.drafts[leg] = said
        self.acceptance = acceptance or self.acceptance

    @property
    def speculation(self) -> Drafts | None:
        """Of all legs; None: nothing was drafted."""
        legs = self.drafts.values()
        if not legs:
            return None
        return Drafts(sum(d.verifications for d in legs), sum(d.drafts for d in legs), sum(d.accepted for d in legs))

    def first_step(self, leg: int, said: FirstStep, emitted: int) -> None:
        """A worker's word on its first token of a leg; comes before that token. `emitted`: tokens before it."""
        if emitted == 0:
            self._first = (leg, said)
        elif emitted == 1 and not self.gap_step_ms:
            self.gap_step_ms = said.queue_ms + said.prefill_ms + said.prefill_wait_ms

    def recovered(self, kind: RecoveryKind, now: float) -> None:
        self.recoveries.append(Recovery(kind, now))
        self.recovering = True

    def went_on(self, now: float, before: float) -> None:
        """The first token after a recovery or an adoption; the one before it came then."""
        self.recovering = False
        migration = self.migrations[-1] if self.migrations else None
        if migration is not None and migration.adopted_at is not None and migration.pause_s is None:
            migration.pause_s = now - before
        for recovery in self.recoveries:
            if recovery.until is None:
                recovery.until = now

    def ttft_parts_ms(self, arrived: float, dispatched: float | None, first_token: float | None) -> dict[str, float]:
        """By name, all of TTFT_PARTS in their order; empty without a first token."""
        if dispatched is None or first_token is None:
            return {}
        admitted = arrived if self.admitted is None else self.admitted
        leg, said = self._first or (None, _NOTHING)
        started = dispatched
        if self.recoveries and leg is not None:
            started = max(dispatched, self.legs.get(leg, dispatched))
        recovery_ms = (started - dispatched) * 1e3 + said.held_ms
        on_worker_ms = said.queue_ms + said.prefill_ms + said.prefill_wait_ms + said.send_ms
        values = (
            (admitted - arrived) * 1e3,
            (dispatched - admitted) * 1e3,
            recovery_ms,
            max(0.0, (first_token - dispatched) * 1e3 - recovery_ms - on_worker_ms),
            said.queue_ms,
            said.prefill_ms,
            said.prefill_wait_ms,
            said.send_ms,
        )
        return dict(zip(TTFT_PARTS, values, strict=True))
