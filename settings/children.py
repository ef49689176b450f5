"""The processes that this one started, and those that they started: found by the kernel's table, ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable

_LOOK_S = 0.05


def descendants(of: int | None = None) -> set[int]:
    """Of this process, if none is named. Linux; elsewhere none are known."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat") as file:
                stat = file.read().rpartition(")")[2].split()  # a command's name may hold anything
                if stat[0] != "Z":
                    parents[int(name)] = int(stat[1])
    found, look = set(), {os.getpid() if of is None else of}
    while look:
        look = {pid for pid, parent in parents.items() if parent in look and pid not in found}
        found |= look
    return found


def end(processes: Iterable[int], patience_s: float) -> None:
    """SIGTERM, then SIGKILL. Those that became others' children in between are known here still: name them before."""
    left = set(processes)
    began = {pid: _began(pid) for pid in left}
    for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 2.0)):
        left = {pid for pid in left if began[pid] and _began(pid) == began[pid]}  # a number may be another's by now
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + wait_s
        while left and time.monotonic() < deadline:
            left = {pid for pid in left if _began(pid) == began[pid]}
            time.sleep(_LOOK_S)


def _began(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty when it is gone, or only waits to be collected."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            stat = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if stat[0] == "Z" else stat[19]
