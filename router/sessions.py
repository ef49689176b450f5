"""Which workers served a session last, by the `prompt_cache_key` that its requests carry.

What a cache holds is found without it (prefix_index.py). This is for what no report shows yet: the answer that another
request of the session is still writing, the prefix that ten of its requests are about to compute at once. It decides
between placements that cost about the same, and no more.
"""

from __future__ import annotations

from collections import OrderedDict

from router.placement.policy import Route
from router.placement.view import WorkerKey
from router.request import Request

_MAX_SESSIONS = 1 << 16


class Sessions:
    """Bounded: the sessions that were seen last."""

    def __init__(self, max_sessions: int = _MAX_SESSIONS) -> None:
        self._max_sessions = max_sessions
        self._workers: OrderedDict[tuple[str, str], tuple[WorkerKey, ...]] = OrderedDict()

    def workers_of(self, request: Request) -> tuple[WorkerKey, ...]:
        if not request.prompt_cache_key:
            return ()
        return self._workers.get((request.cache_salt, request.prompt_cache_key), ())

    def served(self, request: Request, route: Route) -> None:
        if not request.prompt_cache_key:
            return
        key = request.cache_salt, request.prompt_cache_key
        workers = (route.decode,) if route.prefill is None else (route.decode, route.prefill)
        self._workers[key] = workers
        self._workers.move_to_end(key)
        while len(self._workers) > self._max_sessions:
            self._workers.popitem(last=False)
