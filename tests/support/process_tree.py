"""Which processes a process has started."""

from __future__ import annotations

import contextlib

import psutil


def descendants(pid: int) -> dict[psutil.Process, str]:
    """A process's children, theirs, and so on, with their command lines (Ray's say there what they are)."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found[process] = " ".join(process.cmdline()).strip()
    return found


def runs(process: psutil.Process) -> bool:
    """The same one, not another with its number."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
