"""A server process ends within its bound, also when its event loop does not turn any more."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def test_a_stuck_process_leaves_with_its_stacks() -> None:
    code = "import time; from settings.process import exit_after; exit_after(0.2); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 3
    assert "not stopped within 0.2 s" in done.stderr
    assert "time.sleep" in done.stderr or "<string>" in done.stderr


def test_a_stop_that_ends_is_not_cut_short() -> None:
    code = """
import asyncio, os, signal
from settings.process import Leaving

async def main():
    leaving = Leaving()
    os.kill(os.getpid(), signal.SIGTERM)
    await leaving.asked.wait()
    async def drain(): await asyncio.sleep(60)   # never in time
    async def stop(): print("stopped", flush=True)
    await leaving.run(drain, stop, -0.9)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.strip()) == (0, "stopped"), done.stderr


def test_stacks_are_shown_also_of_a_grpc_server() -> None:
    """Its own tasks are compiled code without line numbers, at which asyncio's printer fails."""
    code = """
import asyncio, grpc
from settings.process import print_stacks

async def main():
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await asyncio.sleep(0)
    print_stacks()
    await server.stop(None)
    print("went on", flush=True)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.strip()) == (0, "went on"), done.stderr
    assert "_server_main_loop" in done.stderr
    assert "in main" in done.stderr


def test_a_process_leaves_when_who_started_it_is_killed(tmp_path: Path) -> None:
    child = f"""
import asyncio
from pathlib import Path
from settings.process import Leaving

async def main():
    leaving = Leaving()
    Path({str(tmp_path)!r}, "up").touch()
    await leaving.asked.wait()
    Path({str(tmp_path)!r}, "left").touch()

asyncio.run(main())
"""
    parent = f"""
import os, subprocess, sys, time
from settings.process import DIES_WITH
env = os.environ | {{DIES_WITH: str(os.getpid())}}
subprocess.Popen([sys.executable, "-c", {child!r}], env=env, start_new_session=True)
time.sleep(60)
"""
    started = subprocess.Popen([sys.executable, "-c", parent])
    try:
        wait_for(tmp_path / "up")
    finally:
        started.kill()
        started.wait()
    wait_for(tmp_path / "left")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20.0
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)
