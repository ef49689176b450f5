"""Where in a JSON Schema the keyword stands that a grammar library complained of: it names what, and not where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_MAX_NODES = 20_000
_NAMES = (
    "properties",
    "patternProperties",
    "$defs",
    "definitions",
    "dependentSchemas",
)  # children are named by clients
_WORD = re.compile(r"[A-Za-z$]+")


def place_of(schema: Any, error: str) -> str:
    """As properties.city.contains; "" if the error tells nothing that is found in the schema."""
    words = set(_WORD.findall(error))
    for path, key, value in _keywords(schema):
        if _meant(key, value, words, error):
            return ".".join([*path, key])[:300]
    return ""


def _meant(key: str, value: Any, words: set[str], error: str) -> bool:
    match key:
        case "$ref":
            return isinstance(value, str) and len(value) > 1 and value.lstrip("#") in error
        case "pattern":
            return "regex" in words and isinstance(value, str) and f"error: {' '.join(value.split())} " in f"{error} "
        case "patternProperties":
            return "regex" in words and isinstance(value, dict) and any(" ".join(p.split()) in error for p in value)
        case "$defs" | "definitions":
            return False
        case "type" | "format":
            return key in words and (not isinstance(value, str) or value in error)
    return key in words


def _keywords(schema: Any) -> Iterator[tuple[list[str], str, Any]]:
    """In the order in which they are written, as far as it is worth it."""
    waiting: list[tuple[list[str], Any, bool]] = [([], schema, False)]
    for _ in range(_MAX_NODES):
        if not waiting:
            return
        path, node, named = waiting.pop()
        if isinstance(node, list):
            waiting += [([*path, str(i)], child, False) for i, child in reversed(list(enumerate(node)))]
        elif isinstance(node, dict):
            if not named:
                yield from ((path, key, value) for key, value in node.items())
            waiting += [
                ([*path, key], child, not named and key in _NAMES) for key, child in reversed(list(node.items()))
            ]
