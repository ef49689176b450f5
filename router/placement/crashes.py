"""Workers that crashed, and the requests that they had then: which of them is not placed once more.

A crash is the end of a worker's stream while it has requests, without a drain and without silence: the process ended,
or said that its engine broke. A host that falls silent (a cut, power, a pause) is none, and what was taken for one is
taken back when the same incarnation answers again. A decode worker may be the first to hear that its source is gone:
that counts as a crash of the source, unless it is heard of since.

    first crash     everybody goes on elsewhere: one fault, one recovery
    second crash    of those that were in two crashed batches, the ones are given up that got no token in between: what
                    crashes a worker at one position does so at the same one again, before its next token. Where all of
                    them got some, all of them are given up.
    third crash     everybody that was in all three

Whatever a worker had counts as its batch, what still waited there included: word that it had begun may be lost with the
worker. Who shared both batches by chance is given up with the guilty one; nobody can tell them apart from outside. A
crash is forgotten after a minute: a long answer may outlive unlucky ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from router.placement.policy import WorkerKey

FORGOTTEN_AFTER_S = 60.0
UNDER_WAY_S = 0.1  # a worker's last words may be heard so long after hearsay of its end


@dataclass(frozen=True, slots=True)
class Crash:
    """As one request saw it, with `emitted` tokens so far."""

    worker: WorkerKey
    at: float
    emitted: int
    hearsay: bool = False  # from a reader of its KV


class Suspect(Protocol):
    crashes: list[Crash]
    emitted: list[int]


S = TypeVar("S", bound=Suspect)


def crashed(worker: WorkerKey, batch: Sequence[S], now: float, alive: Callable[[Crash], bool]) -> list[S]:
    """Remembers the crash with each of `batch`; returns those that are given up. `alive`: of hearsay, what is wrong."""
    again: list[S] = []
    stuck: list[S] = []
    for one in batch:
        one.crashes = [
            c
            for c in one.crashes
            if c.worker != worker and now - c.at < FORGOTTEN_AFTER_S and not (c.hearsay and alive(c))
        ]
        if one.crashes:
            again.append(one)
            if len(one.emitted) == one.crashes[-1].emitted or len(one.crashes) > 1:
                stuck.append(one)
        one.crashes.append(Crash(worker, now, len(one.emitted)))
    return stuck or again


def came_back(worker: WorkerKey, suspects: Sequence[Suspect]) -> None:
    """The same incarnation: it had not crashed."""
    for one in suspects:
        if one.crashes:
            one.crashes = [c for c in one.crashes if c.worker != worker]


def why_given_up(suspect: Suspect) -> str:
    names = ", ".join(c.worker.worker_id for c in suspect.crashes)
    return (
        f"the request was running on two workers that crashed ({names}) and is not placed on another; if it was there "
        "by chance, send it again; if it is why they crashed, their logs and its shape in diptych.crashes show more"
    )
