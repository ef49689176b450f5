"""What a process that starts is doing, told to whoever waits for it: a line in the log, and one listener.

    loading the model -> compiling the kernels -> trying the kernels -> ... -> SERVES

`diptych up` listens by a file for plain processes ($DIPTYCH_PHASE_FILE) and by Ray's directory actor under Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

FILE_VARIABLE = "DIPTYCH_PHASE_FILE"
SERVES = "serves"
UNKNOWN = "starting Python"  # before a process can say anything

_listener: Callable[[str], None] | None = None


def tell_phases_to(listener: Callable[[str], None] | None) -> None:
    """In place of the file. What it raises is not heard: nobody fails to start because nobody listens."""
    global _listener
    _listener = listener


def phase(what: str) -> None:
    """Any thread."""
    log.info("start: %s", what)
    with contextlib.suppress(Exception):
        if _listener is not None:
            _listener(what)
        elif path := os.environ.get(FILE_VARIABLE):
            Path(path).write_text(what)


def read_phase(path: Path) -> str:
    try:
        return path.read_text() or UNKNOWN
    except OSError:
        return UNKNOWN


def waiting_for(phases: dict[str, str]) -> str:
    """One line about those that do not serve yet, by name."""
    missing = [f"{name} ({what})" for name, what in sorted(phases.items()) if what != SERVES]
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    return "waiting for " + (", ".join(missing[:4]) + more if missing else "the router to reach every worker")
