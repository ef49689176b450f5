"""Has the last engine come to rest, so that the next one can be timed?

Threads of an engine spin for a while after their last step (OpenMP's, the native kernels', an idle event loop), in our
own process or in another one, and take processors from whoever is timed next: "33 tokens came sooner than one" was such
a case. So before each turn:

    1  the processor time of this process and of the others' sessions over a window must be about nothing
    2  a calibration loop on as many threads as the engines use must reach its speed of before any engine was there

The first is ours to answer for: without it within its time the benchmark ends, and says who is busy. The second may
fail because somebody else uses the machine: the turn is then counted as disturbed, and the result says how many were.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WINDOW_S = 0.3
BUSY_SHARE = 0.05  # of one processor; a tick of /proc is 0.033 of the window
QUIET_SPEED = 0.9  # of the calibration's best
REST_S = 30.0
QUIET_S = 3.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_DATA = bytes(1 << 20)


class NotAtRest(Exception):
    """Names who is busy."""


def session_cpu_s(session: int) -> float:
    """User and system time of every process of a session, all threads."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def spin_speed(threads: int) -> float:
    """Megabytes a second that `threads` threads hash together: all of their processors must be free (15 ms each)."""
    rounds = 16

    def spin(_: int) -> None:
        for _ in range(rounds):
            hashlib.sha1(_DATA).digest()  # releases the interpreter's lock

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # the threads are there
        begun = time.perf_counter()
        list(pool.map(spin, range(threads)))
        return threads * rounds / (time.perf_counter() - begun)


@dataclass
class Rest:
    """One for a benchmark, made before its engines. `cpu_s`: who may be busy, and the processor time used so far."""

    threads: int
    cpu_s: Mapping[str, Callable[[], float]]
    speed: Callable[[int], float] = spin_speed
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    waits: int = 0
    disturbed: int = 0
    waited_s: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)  # the largest that was let through

    def __post_init__(self) -> None:
        self.quiet = max(self.speed(self.threads) for _ in range(9))

    def wait(self) -> None:
        """Raises NotAtRest. Comes back when a turn may begin."""
        begun = self.clock()
        while True:
            before, since = {name: read() for name, read in self.cpu_s.items()}, self.clock()
            self.sleep(WINDOW_S)
            window = self.clock() - since
            shares = {name: (read() - before[name]) / window for name, read in self.cpu_s.items()}
            busy = {name: share for name, share in shares.items() if share > BUSY_SHARE}
            if not busy:
                break
            if self.clock() - begun > REST_S:
                who = ", ".join(f"{name} uses {share:.2f} processors" for name, share in busy.items())
                raise NotAtRest(f"{REST_S:g} s after the last turn {who}; nothing can be timed beside that")
        until = self.clock() + QUIET_S
        while (speed := self.speed(self.threads)) < QUIET_SPEED * self.quiet and self.clock() < until:
            self.sleep(0.05)
        self.quiet = max(self.quiet, speed)  # a machine that was busy when we began
        self.waits += 1
        self.disturbed += speed < QUIET_SPEED * self.quiet
        self.speeds.append(speed)
        self.waited_s.append(self.clock() - begun)
        for name, share in shares.items():
            self.shares[name] = max(self.shares.get(name, 0.0), share)

    def proof(self) -> dict[str, Any]:
        """For the result."""
        return {
            "turns": self.waits,
            "waited_s_longest": round(max(self.waited_s, default=0.0), 2),
            "busy_share_largest": {name: round(share, 3) for name, share in self.shares.items()},
            "spin_speed_least": round(min(self.speeds, default=0.0) / self.quiet, 3),
            "disturbed_turns": self.disturbed,
        }

    def summary(self) -> str:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return (
            f"at rest before {self.waits} of {self.waits} turns (longest wait {max(self.waited_s, default=0.0):.1f} s; "
            f"of a processor at most: {shares}); machine quiet before {self.waits - self.disturbed} "
            f"(a spin loop reached {QUIET_SPEED:.0%} of its best)"
        )
