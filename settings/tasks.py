"""asyncio tasks whose end is heard of. One that dies in silence leaves others waiting for what it was to do."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_EXIT_CODE = 5


def vital(work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
    """What the process cannot do without: should it fail, the process says why and is gone, and its peers know it."""
    task = asyncio.create_task(work, name=what)
    task.add_done_callback(_exit_if_failed)
    return task


def _exit_if_failed(task: asyncio.Task[None]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if error is not None:
        log.critical("%s failed; this process ends now", task.get_name(), exc_info=error)
        sys.stderr.flush()
        os._exit(_EXIT_CODE)


async def beside(main: Coroutine[Any, Any, T], *others: Coroutine[Any, Any, None]) -> T:
    """`main` to its end, with the others beside it; they may end before. Should one fail, its exception is raised.

    If it fails as `main` ends, `main` has the last word. All have ended when this returns.
    """
    tasks = [asyncio.create_task(main), *(asyncio.create_task(other) for other in others)]
    waiting: set[asyncio.Task[Any]] = set(tasks)
    try:
        while not tasks[0].done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] not in done:
                for task in done:
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return tasks[0].result()
