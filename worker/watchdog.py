"""Is this worker still getting anywhere? A stuck worker must not look healthy.

    every second: facts ──look──> ok ──half the limit──> suspect (a warning) ──the limit──> stalled (the worker ends)

Threads leave time stamps as they go; nobody is asked and nothing is locked, since whoever is stuck could not answer.
Silence is counted only while the watchdog itself turns: a process that was stopped as a whole (SIGSTOP, a debugger, a
frozen container) is not stalled when it goes on.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

_LONGEST_GAP_S = 2.0  # what one look may add to a silence; looks are a second apart
_STEPS_OF_PATIENCE = 4.0


class Health(enum.IntEnum):
    OK = 0
    SUSPECT = 1
    STALLED = 2


@dataclass(frozen=True, slots=True)
class Facts:
    """Stamps are of the monotonic clock that `now` is of."""

    engine_alive: bool
    engine_turn: float  # the engine loop came by
    step_since: float | None  # it is inside `execute` since then
    transport_alive: bool
    transport_turn: float  # the transport thread came back from a call
    oldest_pull_since: float | None  # of those without an outcome
    late_ranks: str = ""  # of a worker of several: who holds up the others
    transport_of: str = ""  # of several ranks: whose transport was silent for longest


@dataclass(frozen=True, slots=True)
class Limits:
    step_s: float
    transport_s: float
    pull_timeout_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """`part` is what is stuck, `reason` says it in words: what, since when, which limit, what it may be."""

    health: Health
    part: str = ""
    reason: str = ""


class Silence:
    """For how long one stamp has not moved."""

    def __init__(self) -> None:
        self._stamp: float | None = None
        self._looked: float | None = None
        self._silent_s = 0.0

    def look(self, now: float, stamp: float | None) -> float:
        """No stamp: nothing is going on that could be late."""
        gap = 0.0 if self._looked is None else min(max(now - self._looked, 0.0), _LONGEST_GAP_S)
        self._looked = now
        if stamp is None:
            self._silent_s = 0.0
        elif stamp != self._stamp:
            self._silent_s = min(max(now - stamp, 0.0), gap)
        else:
            self._silent_s += gap
        self._stamp = stamp
        return self._silent_s


class Watchdog:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._engine, self._transport, self._pulls = Silence(), Silence(), Silence()

    def look(self, now: float, facts: Facts) -> Verdict:
        """The worst of all parts; of two that are equally bad, the engine."""
        return max((self._of_engine(now, facts), self._of_transport(now, facts), self._of_pulls(now, facts)), key=_rank)

    def _of_engine(self, now: float, facts: Facts) -> Verdict:
        in_step = facts.step_since is not None
        silent_s = self._engine.look(now, facts.step_since if in_step else facts.engine_turn)
        if not facts.engine_alive:
            return Verdict(Health.STALLED, "engine", "the engine thread has ended; its error is in the log above")
        who = facts.late_ranks or "the device or a kernel hangs"
        what = (
            f"the engine is inside one step for {silent_s:.1f} s; {who}, or honest steps take that long here (then "
            "raise worker.stall_s, or lower engine.max_batch_tokens)"
            if in_step
            else f"the engine loop has not turned for {silent_s:.1f} s, outside of any step"
        )
        limit_s = self.limits.step_s
        return _judge(silent_s, limit_s, "engine", f"{what}; limit {limit_s:.3g} s (worker.stall_s)")

    def _of_transport(self, now: float, facts: Facts) -> Verdict:
        silent_s = self._transport.look(now, facts.transport_turn)
        if not facts.transport_alive:
            return Verdict(Health.STALLED, "transport", "the transport thread has ended; its error is in the log above")
        limit_s = self.limits.transport_s
        late = f" ({facts.late_ranks})" if facts.late_ranks else ""
        return _judge(
            silent_s,
            limit_s,
            "transport",
            f"the transport thread{facts.transport_of} is inside one call for {silent_s:.1f} s, and no KV moves{late}; "
            f"limit {limit_s:g} s (worker.transport_stall_s)",
        )

    def _of_pulls(self, now: float, facts: Facts) -> Verdict:
        """The transport ends every pull by its timeout, whatever the peer does. If not, it turns without working."""
        late_s = self._pulls.look(now, facts.oldest_pull_since) - self.limits.pull_timeout_s
        limit_s = self.limits.transport_s
        return _judge(
            late_s,
            limit_s,
            "pulls",
            f"the transport turns, but a pull has no outcome {late_s:.1f} s after its timeout of "
            f"{self.limits.pull_timeout_s:g} s; limit {limit_s:g} s (worker.transport_stall_s)",
        )


def _judge(silent_s: float, limit_s: float, part: str, reason: str) -> Verdict:
    if silent_s < limit_s / 2:
        return Verdict(Health.OK)
    return Verdict(Health.STALLED if silent_s >= limit_s else Health.SUSPECT, part, reason)


def _rank(verdict: Verdict) -> Health:
    return verdict.health


def step_limit_s(stall_s: float, max_batch_tokens: int, prefill_tokens_per_s: float) -> float:
    """A slow machine must not be taken for a stuck one: several of its own full steps, if that is more."""
    if prefill_tokens_per_s <= 0:
        return stall_s
    return max(stall_s, _STEPS_OF_PATIENCE * max_batch_tokens / prefill_tokens_per_s)
