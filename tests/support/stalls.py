"""How long an event loop was kept from its other work, in processor time, so that a busy machine does not count."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.in_process_router import InProcessRouter

PACE_S = 0.021  # of `pace_s` on the processor where the limits of tests were set


class Stalls:
    longest_s = 0.0


def pace_s() -> float:
    """Processor time of a fixed piece of parsing and interpreting. Limits are set for `PACE_S`: on a slower processor,
    or beside a neighbour on the same core, they are larger.
    """
    begun = time.process_time()
    text = "[" + "1234567," * 200_000 + "1]"
    assert sum(n & 1 for n in json.loads(text)) > 0
    return time.process_time() - begun


@contextmanager
def stalls_of(router: InProcessRouter) -> Iterator[Stalls]:
    """The longest time between two turns of the router's loop, counted in the process's processor time: what runs on
    the loop is in it, and what runs on other threads and keeps the interpreter to itself.
    """
    stalls, over = Stalls(), False

    async def watch() -> None:
        last = time.process_time()
        while not over:
            await asyncio.sleep(0)
            now = time.process_time()
            stalls.longest_s = max(stalls.longest_s, now - last)
            last = now

    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(watch())

    async def end() -> None:
        nonlocal over
        over = True
        await task

    task = router.on_loop(begin(), 10.0)
    try:
        yield stalls
    finally:
        router.on_loop(end(), 30.0)
