"""A cluster that was scaled to zero: no worker is there, and a request brings them back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_LOOK_S = 0.02


async def woken(asleep: Callable[[], bool], deadline: float, clock: Callable[[], float]) -> None:
    """That a request is live is what brings workers (scaling/policy.py). Afterwards it is placed or refused as any."""
    while asleep() and clock() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_S)
