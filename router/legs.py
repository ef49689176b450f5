"""What a request's life is made of: its legs on workers, handoffs between them, and its moments."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from router.breakdown import Migration
from router.errors import Code, Failure
from router.placement.policy import WorkerKey


class Text(Protocol):
    stopped: bool

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class LegRole(enum.Enum):
    PREFILL = enum.auto()
    DECODE = enum.auto()


@dataclass(slots=True)
class Leg:
    number: int
    role: LegRole
    worker: WorkerKey
    adopted: bool = False  # decode: has the KV, or computes it itself
    tells_cached: bool = False  # what of the prompt it found cached is the request's `cached_tokens`


@dataclass(slots=True)
class Timeline:
    """Absolute times; None: has not happened."""

    dispatched: float | None = None
    first_token: float | None = None
    second_token: float | None = None
    last_token: float | None = None
    ended: float | None = None


@dataclass(slots=True)
class Handoff:
    """One attempt to move this request's KV. Alive until it is adopted or has failed.

    `migration`: the source goes on with the answer until it is frozen, at `most_tokens` tokens at the latest.
    """

    handoff_id: str
    source: WorkerKey
    leg: int  # the source's: it names the lease also after that leg has ended by handing over
    emitted: tuple[int, ...]  # what the source was given to start from
    handed_over: bool = False
    migration: Migration | None = None
    most_tokens: int = 0
    pull_bytes: int = 0

    def lapse(self, why: str) -> None:
        if self.migration is not None:
            self.migration.outcome = why

    @property
    def under_way(self) -> bool:
        """The source was not told to hand over yet."""
        return self.migration is not None and self.migration.frozen_at is None


def too_late(within_s: float, sent_tokens: int) -> Failure:
    return Failure(
        Code.DEADLINE_EXCEEDED,
        f"no complete answer within {within_s:.3g} s ({sent_tokens} tokens were sent); "
        "allow more time, or ask for fewer tokens",
    )


@dataclass(frozen=True, slots=True)
class RecoveryLimits:
    max_attempts: int = 3
    wait_s: float = 5.0
