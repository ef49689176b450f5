"""Processes that a benchmark starts and waits for. Whoever waits learns at once that one has ended, and what it said.

1  Child(...)             starts it; what it writes is in a log file
2  wait_until, answer     wait for it; ChildEnded with exit code and last lines as soon as it is gone
3  stop                   ends it, and what it started if it has a session of its own
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What is asked runs on this machine: no proxy stands between, whatever http_proxy says.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_LAST_LINES = 15
_LOOK_EVERY_S = 0.5


class ChildEnded(Exception):
    """A process ended while somebody waited for it: which, its exit code, its last lines."""


class ChildSilent(Exception):
    """A process lives and does not do within a time what it should: which, what, its last lines."""


class Child:
    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        talks: bool = False,
        own_session: bool = False,
    ) -> None:
        """`directory`: of the log. `talks`: by lines, over stdin and stdout; otherwise stdout goes to the log too."""
        self.name = name
        self.log = directory / f"{name.replace(' ', '-')}.log"
        self._own_session = own_session
        self._unread = b""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else log,
                stderr=log,
                env=environment,  # None: ours
                cwd=cwd,
                start_new_session=own_session,
            )
        self.pid = self._process.pid
        self.failed = False  # somebody was told so

    def check(self) -> None:
        """Raises ChildEnded if it has."""
        code = self._process.poll()
        if code is not None:
            self.failed = True
            raise ChildEnded(f"{self.name} ended {_how(code)}; {self.last_lines()}")

    def last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
        return f"its last lines ({self.log}):\n" + ("\n".join(f"  {line[-300:]}" for line in lines) or "  none")

    def ask(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._reap()

    def answer(self, timeout_s: float) -> str:
        """Its next line. Raises ChildEnded or ChildSilent."""
        out = self._process.stdout
        assert out is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([out], [], [], min(_LOOK_EVERY_S, max(0.0, deadline - time.monotonic())))
            if not ready:
                self.check()  # what it started may hold its side open when it is gone
                if time.monotonic() >= deadline:
                    self.failed = True
                    raise ChildSilent(f"{self.name} gave no answer within {timeout_s:g} s; {self.last_lines()}")
                continue
            piece = os.read(out.fileno(), 1 << 16)
            if not piece:
                self._reap()
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def stop(self) -> None:
        if self._own_session:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass

    def _reap(self) -> None:
        """It closed its side: it is ending, or as good as gone."""
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.stop()
        self.check()


def _how(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"


def wait_until(ready: Callable[[], bool], timeout_s: float, what: str, *children: Child) -> None:
    """Raises ChildEnded as soon as one of the children is gone, ChildSilent after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        for child in children:
            child.check()
        if time.monotonic() > deadline:
            words = "\n".join(f"{child.name}: {child.last_lines()}" for child in children)
            raise ChildSilent(f"not within {timeout_s:g} s: {what}\n{words}")
        time.sleep(0.1)


def hear(pipe: connection.Connection, timeout_s: float, what: str, *processes: Any) -> Any:
    """What comes over the pipe of a `multiprocessing` process. Its traceback, if it has one, is on stderr already."""
    sentinels = {process.sentinel: process for process in processes}
    ready = connection.wait([pipe, *sentinels], timeout_s)
    if pipe in ready:
        try:
            return pipe.recv()
        except EOFError:
            ready = connection.wait(list(sentinels), 10.0)
    for sentinel in ready:
        process = sentinels[sentinel]  # type: ignore[index]
        process.join()
        raise ChildEnded(f"{what}: the process {process.name} ended {_how(process.exitcode)}; stderr above says why")
    raise ChildSilent(f"not within {timeout_s:g} s: {what}")
