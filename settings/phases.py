"""What a process that starts is doing, told to whoever waits for it: a line in the log, and one listener.

    loading the model (40 %) -> compiling the kernels -> trying the kernels -> ... -> SERVES

`diptych up` listens by a file for plain processes ($DIPTYCH_PHASE_FILE) and by Ray's directory actor under Ray. With
SERVES the log gets one line that says where the time went, counted from the beginning of the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

FILE_VARIABLE = "DIPTYCH_PHASE_FILE"
SERVES = "serves"
UNKNOWN = "starting Python"  # before a process can say anything
BEFORE = "Python and imports"  # what passed until the first phase
_SHORT_S = 0.05  # what took less is told together

_listener: Callable[[str], None] | None = None


class Start:
    """The phases of one start, in order. One that comes again counts where it came first."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._entered, self.current = began, BEFORE
        self._spent: dict[str, float] = {}

    def enter(self, what: str, now: float) -> None:
        self._spent[self.current] = self._spent.get(self.current, 0.0) + now - self._entered
        self._entered, self.current = now, what

    def told(self) -> str:
        """Up to the phase that it is in."""
        long = {what: s for what, s in self._spent.items() if s >= _SHORT_S}
        rest = sum(self._spent.values()) - sum(long.values())
        parts = [f"{what} {s:.1f}" for what, s in long.items()] + [f"the rest {rest:.1f}"] * (rest > 0)
        return f"ready after {self._entered - self._began:.1f} s: {', '.join(parts)}"


def began() -> float:
    """When this process began, on the monotonic clock; now, where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.monotonic() - max(0.0, age)


_start: Start | None = None
_served = False  # once; what begins then is another start
_lock = threading.Lock()


def tell_phases_to(listener: Callable[[str], None] | None) -> None:
    """In place of the file. What it raises is not heard: nobody fails to start because nobody listens."""
    global _listener
    _listener = listener


def phase(what: str) -> None:
    """Any thread. After SERVES another start may begin in the same process."""
    global _start, _served
    now = time.monotonic()
    with _lock:
        start = _start or Start(now if _served else began())
        start.enter(what, now)
        _start, _served = (None, True) if what == SERVES else (start, _served)
    log.info("start: %s", what if what != SERVES else start.told())
    _tell(what)


def progress(how_far: str) -> None:
    """Of the phase that this process is in: "40 %"."""
    start = _start
    if start is not None:
        what = f"{start.current} ({how_far})"
        log.info("start: %s", what)
        _tell(what)


def _tell(what: str) -> None:
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
