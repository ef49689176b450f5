"""What a tool parser says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Of the answer, outside of calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Calls are numbered from 0 within an answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments, a JSON text. All pieces of a call that ended well are a JSON object."""

    index: int
    text: str


ToolEvent = Text | CallStart | CallArguments


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str


def collect(events: Iterable[ToolEvent]) -> tuple[str, list[Call]]:
    """The whole answer: its text and its calls."""
    text, names, arguments = [], [], []
    for event in events:
        match event:
            case Text(piece):
                text.append(piece)
            case CallStart(_, name):
                names.append(name)
                arguments.append("")
            case CallArguments(index, piece):
                arguments[index] += piece
    return "".join(text), [Call(n, a) for n, a in zip(names, arguments, strict=True)]
