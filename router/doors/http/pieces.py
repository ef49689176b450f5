"""Large answers as JSON. A JSON library holds the interpreter for the whole of a call, and tokens of others wait: what
has many log-probabilities is written in many calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import to_json

AT_ONCE = 64  # elements of a list: some 1300 log-probabilities, half a millisecond
_HOLDERS = frozenset({"choices", "output", "logprobs", "content", "tokens"})  # keys, of objects that hold long lists


def json_of(value: Any) -> bytes:
    return b"".join(pieces(value))


def pieces(value: Any) -> Iterator[bytes]:
    """Each is written without a pause."""
    if _holds(value):
        for i, (key, part) in enumerate(value.items()):
            yield (b"," if i else b"{") + to_json(key) + b":"
            yield from pieces(part)
        yield b"}"
    elif not isinstance(value, list) or not value:
        yield to_json(value)
    elif _holds(value[0]):
        for i, part in enumerate(value):
            yield b"," if i else b"["
            yield from pieces(part)
        yield b"]"
    else:
        for first in range(0, len(value), AT_ONCE):
            yield (b"," if first else b"[") + to_json(value[first : first + AT_ONCE])[1:-1]
        yield b"]"


def _holds(value: Any) -> bool:
    return isinstance(value, dict) and not _HOLDERS.isdisjoint(value)
