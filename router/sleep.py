"""A cluster that was scaled to zero: no worker is there, and a request brings them back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from router.admission import ServedModel
from router.placement.cluster import Cluster, Role

_LOOK_S = 0.02


class Sleeper(Protocol):
    cluster: Cluster
    leaving: bool
    asleep: Callable[[], bool]

    def served_model(self) -> ServedModel: ...


async def woken(router: Sleeper, deadline: float, clock: Callable[[], float]) -> ServedModel | None:
    """Waits until a decode worker is there, if ever, and returns what is served then; None: nobody sleeps. That a
    request is live is what brings workers (scaling/policy.py). Afterwards it is placed or refused as any.
    """
    if router.cluster.ready(Role.DECODE) or not router.asleep():
        return None
    while not router.cluster.ready(Role.DECODE):
        if router.leaving or clock() >= deadline or not router.asleep():
            break
        await asyncio.sleep(_LOOK_S)
    return router.served_model()
