from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from settings.tasks import beside


async def say(word: str, ended: list[str]) -> str:
    try:
        await asyncio.sleep(0 if word else 60)
    finally:
        ended.append(word)
    return word


async def wait(ended: list[str]) -> None:
    await say("", ended)


async def fail() -> None:
    raise ValueError("broken")


async def leave(ended: list[str]) -> None:
    ended.append("left")


async def test_the_end_of_the_main_one_is_the_end_of_all() -> None:
    ended: list[str] = []
    assert await beside(say("a", ended), wait(ended), wait(ended)) == "a"
    assert sorted(ended) == ["", "", "a"]


async def test_one_beside_it_may_end_but_not_fail() -> None:
    ended: list[str] = []
    assert await beside(say("a", ended), leave(ended)) == "a"
    assert sorted(ended) == ["a", "left"]
    with pytest.raises(ValueError, match="broken"):
        await beside(say("", ended), wait(ended), fail())
    assert sorted(ended) == ["", "", "a", "left"]


async def test_the_main_one_has_the_last_word() -> None:
    async def over() -> str:
        return "over"

    assert await beside(over(), fail()) == "over"


async def test_a_cancelled_caller_leaves_nothing_behind() -> None:
    ended: list[str] = []
    task = asyncio.create_task(beside(say("", ended), wait(ended)))
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
