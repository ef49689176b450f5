"""What every server process does alike: leave on a signal, show its stacks on request, and end whatever happens.

SIGTERM, SIGINT   drain, then leave; a second one skips the drain; while it starts: leave at once
SIGUSR1           all threads' stacks and all asyncio tasks to stderr, and go on
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from settings import children

T = TypeVar("T")

log = logging.getLogger(__name__)

DIES_WITH = "DIPTYCH_DIES_WITH"  # environment variable: leave as on SIGTERM when this process is gone
LAST_WORDS = "DIPTYCH_LAST_WORDS"  # environment variable: the file for why this process could not start
_PR_SET_PDEATHSIG = 1
_CHILDREN_S = 1.0
_STOP_S = 20.0  # stopping has bounds of its own; this one holds when they do not


class Leaving:
    """Signals as events. `run` drains and stops a server within a bound that needs nobody's good behaviour."""

    def __init__(self) -> None:
        self.asked, self.hurry = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: (self.hurry if self.asked.is_set() else self.asked).set())
        _die_with_parent()
        faulthandler.enable()
        loop.add_signal_handler(signal.SIGUSR1, print_stacks)

    async def start(self, starting: Coroutine[Any, Any, T]) -> T:
        """What comes of it. A signal while it lasts ends the process at once: nobody is served yet."""
        task, asked = asyncio.ensure_future(starting), asyncio.ensure_future(self.asked.wait())
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            log.info("asked to leave while starting; leaving now")
            children.end(children.descendants(), _CHILDREN_S)  # compilers; who waits for them tidies up
            logging.shutdown()
            os._exit(0)  # loading cannot be broken off otherwise
        asked.cancel()
        return task.result()

    async def run(
        self, drain: Callable[[], Awaitable[object]], stop: Callable[[], Awaitable[None]], drain_s: float
    ) -> None:
        log.info("asked to leave: draining for %g s at most; a second signal skips it", drain_s)
        guard = exit_after(drain_s + _STOP_S)
        draining = asyncio.ensure_future(drain())
        hurrying = asyncio.ensure_future(self.hurry.wait())
        await asyncio.wait({draining, hurrying}, timeout=drain_s + 1.0, return_when=asyncio.FIRST_COMPLETED)
        drained = draining.done() and not draining.cancelled() and draining.exception() is None and draining.result()
        log.info("leaving: %s", "drained" if drained else "not everything is done; the rest is cut off")
        draining.cancel()
        hurrying.cancel()
        await stop()
        guard.cancel()


def _die_with_parent() -> None:
    """Whoever started this for its own use (`diptych up`) may be killed: nothing stays behind then. Linux only."""
    parent = os.environ.get(DIES_WITH)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)  # it was gone before we asked


def say_last(error: object) -> None:
    """Why this process cannot start: to stderr, and whole into the file that whoever started it will read."""
    print(error, file=sys.stderr, flush=True)
    path = os.environ.get(LAST_WORDS)
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(str(error))


def exit_after(seconds: float, code: int = 3) -> threading.Timer:
    """A last resort: when it fires, the stacks go to stderr and the process is gone."""

    def give_up() -> None:
        print(f"not stopped within {seconds:g} s; leaving now", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        os._exit(code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    return timer


class PauseWatch:
    """Says in the log when this process did not run although it should have: stopped, or starved."""

    def __init__(self, expected_s: float, tolerated_s: float, now: float) -> None:
        self._expected_s, self._tolerated_s, self._looked = expected_s, tolerated_s, now

    def look(self, now: float) -> None:
        """To be called every `expected_s`."""
        pause_s = now - self._looked - self._expected_s
        self._looked = now
        if pause_s > self._tolerated_s:
            log.warning("this process did not run for %.1f s: it was stopped, or the machine is overloaded", pause_s)


def print_stacks() -> None:
    faulthandler.dump_traceback()
    for task in asyncio.all_tasks():
        try:
            task.print_stack(limit=6, file=sys.stderr)
        except TypeError:  # gRPC's own tasks are compiled: their frames have no line numbers
            print(task, file=sys.stderr, flush=True)
