"""The other routers of the cluster, as workers name them: routers never talk with each other.

Every worker registers with all routers, and tells each with which others it is registered. What all routers share, a
key's limits, is divided by how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

_MOST = 64  # named by one worker
_LOOK_EVERY_S = 0.2  # requests ask
_HEARD_S = 5.0  # a worker that has not said so for longer may be gone, and the router with it


class OtherRouters:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._said: dict[Hashable, tuple[float, frozenset[str]]] = {}
        self.own_id = ""  # set when its port is known
        self._ids: list[str] = []
        self._looked_at = float("-inf")

    def heard(self, worker: Hashable, routers: Iterable[str]) -> None:
        """With each heartbeat."""
        named = frozenset(list(routers)[:_MOST])
        self._said[worker] = (self._clock(), named)

    def ids(self) -> list[str]:
        now = self._clock()
        if now - self._looked_at < _LOOK_EVERY_S:
            return self._ids
        self._looked_at = now
        self._said = {worker: said for worker, said in self._said.items() if now - said[0] < _HEARD_S}
        self._ids = sorted(set[str]().union(*(named for _, named in self._said.values())) - {self.own_id})
        return self._ids

    def count(self) -> int:
        """With this one."""
        return 1 + len(self.ids())
