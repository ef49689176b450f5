"""How long an event loop was kept from its other work, in processor time, so that a busy machine does not count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.in_process_router import InProcessRouter


class Stalls:
    longest_s = 0.0


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
