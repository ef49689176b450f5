"""Sequences that wait for their grammar to be compiled: nothing of theirs is in the engine yet.

What the router says about one meanwhile is kept and said again when it starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from engine.grammar import Grammar
from grammar.structured import Structured
from worker.hosted import HostedSequence
from worker.messages import Command, GrammarCompiled, Link

LONGEST_COMPILE_S = 15.0


class Grammars(Protocol):
    def find(self, structured: Structured) -> Grammar | None:
        """None: it is being compiled, and GrammarCompiled follows."""
        ...

    def keep(self, compiled: GrammarCompiled) -> None: ...


@dataclass(slots=True)
class Waiting:
    hosted: HostedSequence
    give_up: float
    later: list[Command] = field(default_factory=list)


class Compiling:
    """By link and the router's sequence id, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[Link, int], Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def uses(self, adapter: str) -> bool:
        return any(waiting.hosted.start.adapter == adapter for waiting in self._waiting.values())

    def add(self, hosted: HostedSequence, now: float) -> None:
        give_up = now + LONGEST_COMPILE_S
        if hosted.deadline is not None:
            give_up = min(give_up, hosted.deadline)
        self._waiting[hosted.link, hosted.start.sequence_id] = Waiting(hosted, give_up)

    def get(self, link: Link, sequence_id: int) -> Waiting | None:
        return self._waiting.get((link, sequence_id))

    def drop(self, link: Link, sequence_id: int) -> None:
        self._waiting.pop((link, sequence_id), None)

    def drop_link(self, link: Link) -> None:
        self._waiting = {key: w for key, w in self._waiting.items() if key[0] != link}

    def take(self, structured: Structured) -> list[Waiting]:
        return self._take([key for key, w in self._waiting.items() if w.hosted.start.structured == structured])

    def take_late(self, now: float) -> list[Waiting]:
        return self._take([key for key, w in self._waiting.items() if w.give_up <= now])

    def take_all(self) -> list[Waiting]:
        return self._take(list(self._waiting))

    def _take(self, keys: list[tuple[Link, int]]) -> list[Waiting]:
        return [self._waiting.pop(key) for key in keys]

    def deadlines(self) -> list[float]:
        return [w.give_up for w in self._waiting.values()]
