from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from settings.tasks import first_to_end


async def say(word: str, ended: list[str]) -> str:
    try:
        await asyncio.sleep(0 if word else 60)
    finally:
        ended.append(word)
    return word


async def fail() -> str:
    raise ValueError("broken")


async def test_the_first_end_is_the_end_of_all() -> None:
    ended: list[str] = []
    assert await first_to_end(say("", ended), say("a", ended), say("b", ended)) == "a"
    assert sorted(ended) == ["", "a", "b"]
    with pytest.raises(ValueError, match="broken"):
        await first_to_end(say("", ended), fail())
    assert len(ended) == 4


async def test_a_cancelled_caller_leaves_nothing_behind() -> None:
    ended: list[str] = []
    task = asyncio.create_task(first_to_end(say("", ended), say("", ended)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(ended) == 2


def test_a_process_does_not_outlive_what_is_vital() -> None:
    program = """
import asyncio
from settings.tasks import vital
async def work():
    raise ValueError("planted")
async def main():
    cancelled = vital(asyncio.sleep(60), "the other")
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.sleep(0)
    task = vital(work(), "the watch")
    await asyncio.sleep(60)
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 5
    assert "the watch failed; this process ends now" in ended.stderr
    assert "planted" in ended.stderr
