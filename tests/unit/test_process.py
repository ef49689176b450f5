"""A server process ends within its bound, also when its event loop does not turn any more."""

from __future__ import annotations

import signal
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


def test_a_signal_while_it_starts_ends_a_process_and_its_children_at_once() -> None:
    code = """
import asyncio, subprocess, sys, time
from settings.process import Leaving

def load():
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)  # cannot be broken off

async def main():
    leaving = Leaving()
    await leaving.start(asyncio.to_thread(load))
    print("started", flush=True)

asyncio.run(main())
"""
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(10) == 0
        assert process.stdout.read() == ""
        process.stdout.close()
        assert not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text()


def test_what_comes_of_a_start_is_passed_on() -> None:
    code = """
import asyncio
from settings.process import Leaving

async def good(): return 7
async def bad(): raise ValueError("no")

async def main():
    leaving = Leaving()
    print(await leaving.start(good()))
    try:
        await leaving.start(bad())
    except ValueError as error:
        print(error)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.split()) == (0, ["7", "no"]), done.stderr


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
