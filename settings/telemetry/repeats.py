"""No kind of line fills a disk, whoever can bring it about: the first few of each are written, the rest is counted.

A kind is a place in the code and its words without what they are filled with. Libraries log a traceback for what a
stranger sends before anything of ours has seen it; that they do not do so today is no promise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_EVERY_S = 10.0
_LINES = 50
_KINDS = 4096
_MESSAGE_CHARS = 8192


class Repeats(logging.Filter):
    """Of a handler. After `lines` of one kind within `every_s` seconds no more, until they are over."""

    def __init__(
        self, lines: int = _LINES, every_s: float = _EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._lines = lines
        self._every_s = every_s
        self._clock = clock
        self._seen: dict[tuple[str, int, str], tuple[float, int]] = {}  # since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        """Handlers call it with their lock held."""
        now = self._clock()
        words = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        kind = record.name, record.lineno, words[:200]
        since, count = self._seen.get(kind, (now, 0))
        if now - since >= self._every_s:
            if count > self._lines:
                self._say(record, f" (and {count - self._lines} like it in {now - since:.0f} s)")
            since, count = now, 0
        if len(self._seen) >= _KINDS:
            self._seen.clear()
        self._seen[kind] = since, count + 1
        if count >= self._lines:
            return False
        if record.args and sum(len(a) for a in _arguments(record) if isinstance(a, str | bytes)) > _MESSAGE_CHARS:
            self._say(record, "")
        return True

    @staticmethod
    def _say(record: logging.LogRecord, more: str) -> None:
        record.msg, record.args = record.getMessage()[:_MESSAGE_CHARS] + more, ()


def _arguments(record: logging.LogRecord) -> tuple[object, ...]:
    return tuple(record.args.values()) if isinstance(record.args, dict) else tuple(record.args or ())
