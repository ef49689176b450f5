"""What is told of one decision to those who show it: `diptych explain scaling`, the web page, metrics."""

from __future__ import annotations

from dataclasses import dataclass

from scaling.decision import Decision
from scaling.observation import Observation, Pool, Stage


@dataclass(frozen=True, slots=True)
class Counts:
    prefill: int
    decode: int
    standby: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """`number` counts the decisions of one decider: what is told twice is one decision, and the last word holds."""

    decision: Decision
    decider: str
    number: int
    interval_s: float
    before: Counts  # what the platform was asked for
    ready: Counts
    error: str = ""  # why the platform did not take it

    @classmethod
    def of(
        cls, decision: Decision, seen: Observation, decider: str, number: int, interval_s: float, error: str = ""
    ) -> Report:
        alive = (Stage.STARTING, Stage.UNSCHEDULABLE, Stage.READY)
        prefill, decode = seen.prefill_target, seen.decode_target
        before = Counts(
            seen.count(Pool.PREFILL, *alive) if prefill is None else prefill,
            seen.count(Pool.DECODE, *alive) if decode is None else decode,
            seen.count(None, Stage.STANDBY, Stage.STARTING, Stage.UNSCHEDULABLE),
        )
        ready = Counts(
            seen.count(Pool.PREFILL, Stage.READY), seen.count(Pool.DECODE, Stage.READY), seen.count(None, Stage.STANDBY)
        )
        return cls(decision, decider, number, interval_s, before, ready, error)
