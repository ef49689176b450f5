"""A process whose event loop is stuck ends with its stacks; one whose loop turns, or that stops in order, does not."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import asyncio, ctypes, os, sys, time
from worker.loop_guard import LoopGuard

async def main():
    guard = LoopGuard({limit})
    guard.start()
    for _ in range({beats}):
        guard.beat()
        await asyncio.sleep(0.1)
    {then}
    guard.stop()
    print("stopped in order", flush=True)
    await asyncio.sleep(1.5)

{before}
asyncio.run(main())
"""


def run(then: str, limit: float = 0.4, beats: int = 4, before: str = "") -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(then=then, limit=limit, beats=beats, before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_stuck_loop_ends_the_process() -> None:
    done = run("time.sleep(60)")
    assert done.returncode == 4
    assert "the asyncio loop has not turned for 0.4 s" in done.stderr
    assert "in main" in done.stderr, "the stacks show where"


def test_a_call_that_keeps_the_interpreter_ends_the_process() -> None:
    done = run("ctypes.PyDLL(None).sleep(60)")
    assert done.returncode == 1
    assert "Timeout (0:00:01" in done.stderr
    assert "in main" in done.stderr


def test_a_full_stderr_does_not_keep_the_process() -> None:
    """Nobody reads: the stacks cannot be written, the process goes all the same."""
    code = SCRIPT.format(
        then="time.sleep(60)",
        limit=0.4,
        beats=4,
        before="""
r, w = os.pipe()
os.dup2(w, 2)
os.set_blocking(2, False)
try:
    while True: os.write(2, b"x" * 65536)
except BlockingIOError:
    os.set_blocking(2, True)
""",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 4


def test_a_loop_that_turns_and_stops_is_left_alone() -> None:
    done = run("pass", beats=15)
    assert (done.returncode, done.stdout.strip()) == (0, "stopped in order"), done.stderr
