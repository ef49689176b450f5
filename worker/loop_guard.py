"""Ends the process when its asyncio loop is stuck: nobody else could, and a health check might still be answered.

beat() each second, on the loop ──> watched by a daemon thread ──silent for the limit──> stacks, exit 4
                                    watched by a timer in C ──silent for three limits──> stacks, exit 1

The timer is for a call that never gives the interpreter back: then no Python thread runs, this one included.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time

from worker.watchdog import Silence

EXIT_CODE = 4
_LOOK_EVERY_S = 1.0
_LAST_WORDS_S = 2.0
_TIMER_LIMITS = 3.0
_STDERR = 2  # the descriptor: sys.stderr may be an object that needs the loop


class LoopGuard:
    """Armed from `start` to `stop`. The timer is one per process, hence one guard per process."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._beat = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loop-guard", daemon=True)

    def start(self) -> None:
        self.beat()
        self._thread.start()

    def beat(self) -> None:
        self._beat = time.monotonic()

    def stop(self) -> None:
        """Returns at once: the thread may be about to end the process, and then there is nothing to wait for."""
        self._stopping.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        silence = Silence()
        while not self._stopping.wait(min(_LOOK_EVERY_S, self._limit_s / 4)):
            faulthandler.dump_traceback_later(self._limit_s * _TIMER_LIMITS, exit=True, file=_STDERR)
            if silence.look(time.monotonic(), self._beat) >= self._limit_s and not self._stopping.is_set():
                end_process(
                    f"the asyncio loop has not turned for {self._limit_s:g} s (worker.stall_s): a call on it blocks; "
                    "the process ends, since it cannot serve and could not say so. Stacks of all threads:"
                )
        faulthandler.cancel_dump_traceback_later()


def end_process(why: str) -> None:
    """Says why, shows where, and is gone, also when nobody reads stderr any more."""
    last_words = threading.Thread(target=_say, args=(why,), daemon=True)
    last_words.start()
    last_words.join(_LAST_WORDS_S)
    os._exit(EXIT_CODE)


def _say(why: str) -> None:
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"{why}\n".encode())
        faulthandler.dump_traceback(_STDERR)
