"""A server process ends within its bound, also when its event loop does not turn any more."""

from __future__ import annotations

import subprocess
import sys


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
