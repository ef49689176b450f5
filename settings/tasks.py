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


async def first_to_end(*works: Coroutine[Any, Any, T]) -> T:
    """Runs them side by side until one ends, and cancels the others. Its result is returned, its exception raised.

    If several end at once, it is the first by order. All have ended when this returns.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ended = next(task for task in tasks if task.done())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return ended.result()
