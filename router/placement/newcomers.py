"""What a prompt costs those who come after it, by how much is sent to its worker lately. Pure.

A prompt of `own` ms that finds `wait` ms of work before it keeps the worker busy for that much longer. Until the queue
is next empty, everybody who comes there waits for it: in full while what was there before it is computed, for half of
it on average after that. While a worker spends the share `load` of its time on what comes, a ms of work that is there
takes 1 / (1 - load) ms to be gone. So with `rate` prompts a ms, all of them together wait longer by

    rate / (1 - load) x own x (wait + own / 2)      ms

(Haviv and Ritov, "Externalities, tangible externalities, and queue disciplines", Management Science 44(6), 1998). It
grows with the square of the prompt: that keeps long ones together, on few workers, and the many short ones elsewhere.
Queues by due date let short prompts pass, so it is too much for them; it says where a prompt harms least all the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

_TAU_S = 10.0  # what was sent so long ago counts for a third
_LEAST_S = 1.0  # of what was seen, before rates are taken from it
_MOST = 10.0  # of 1 / (1 - load): a queue that never empties is not in the formula


class Newcomers(NamedTuple):
    """As of `at` (s). `rate` in prompts a ms."""

    rate: float = 0.0
    load: float = 0.0
    at: float = 0.0

    def delayed(self, now: float) -> float:
        """Who is delayed by each ms of work: prompts a ms."""
        if not self.rate:
            return 0.0
        fade = math.exp((self.at - now) / _TAU_S) if now > self.at else 1.0
        idle = 1.0 - self.load * fade
        return self.rate * fade * (1.0 / idle if idle * _MOST > 1.0 else _MOST)


NOBODY = Newcomers()


class Arrivals:
    """Of one worker: what was sent there lately."""

    __slots__ = ("_at", "_began", "_busy_ms", "_count")

    def __init__(self) -> None:
        self._count = self._busy_ms = self._at = self._began = 0.0

    def sent(self, own_ms: float, now: float) -> None:
        """A prompt that takes the worker `own_ms`."""
        if not self._count:
            self._began = self._at = now
        keep = math.exp((self._at - now) / _TAU_S) if now > self._at else 1.0
        self._count = self._count * keep + 1.0
        self._busy_ms = self._busy_ms * keep + own_ms
        self._at = max(self._at, now)

    def value(self, now: float) -> Newcomers:
        if not self._count:
            return NOBODY
        at = now if now > self._at else self._at
        seen = 1.0 - math.exp(-max(_LEAST_S, self._at - self._began) / _TAU_S)
        a_ms = math.exp((self._at - at) / _TAU_S) / (seen * _TAU_S * 1e3)
        return Newcomers(self._count * a_ms, self._busy_ms * a_ms, at)
