"""Which adapters there are, by the workers that have them. Names are aliases: a request is given a digest once, when it
comes, and every worker that it meets must have announced that one.

Workers may disagree on a name while one is replaced. It stands for what most workers that are ready have under it.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from router.placement.cluster import Cluster, WorkerInfo
from router.placement.view import WorkerKey

log = logging.getLogger(__name__)

NOBODY: frozenset[WorkerKey] = frozenset()
_SHOWN = 8  # workers that have it loaded, as hints to a placement


class Adapters:
    def __init__(self, cluster: Cluster, models_own: Collection[str]) -> None:
        """`models_own`: names that requests have for the model alone; no adapter goes by one."""
        self._cluster = cluster
        self._models_own = frozenset(models_own)
        self._at: tuple[int, ...] = ()
        self._digests: dict[str, str] = {}
        self._older: dict[str, frozenset[str]] = {}
        self._ready: dict[WorkerKey, frozenset[str]] = {}
        self._complained: set[str] = set()

    def digests(self) -> Mapping[str, str]:
        """By name. A name stays known while its workers are lost, or none is there at all."""
        self._look()
        return self._digests

    def older(self) -> Mapping[str, frozenset[str]]:
        """By name, what else workers have under it: answers that began on one of these may go on with it."""
        self._look()
        return self._older

    def lacking(self, digest: str) -> frozenset[WorkerKey]:
        """The ready workers that cannot compute with it."""
        if not digest:
            return NOBODY
        self._look()
        return frozenset(key for key, has in self._ready.items() if digest not in has)

    def loaded_on(self, digest: str) -> tuple[WorkerKey, ...]:
        """Some of the ready workers that have it in a slot, as they last said."""
        if not digest:
            return ()
        self._look()
        workers = self._cluster.workers
        loads = ((key, workers[key].load) for key, has in self._ready.items() if digest in has)
        return tuple(key for key, load in loads if load is not None and digest in load.loaded_adapters)[:_SHOWN]

    def _look(self) -> None:
        view = self._cluster.view()
        at = view.decode.changes, view.prefill.changes
        if at == self._at:
            return
        self._at = at
        infos = {key: entry.info for key, entry in self._cluster.workers.items()}
        self._ready = {
            w.key: frozenset(digest for _, digest in infos[w.key].adapters)
            for pool in (view.decode, view.prefill)
            for w in pool
        }
        if infos:
            votes = self._votes(infos)
            self._digests = {name: max(f, key=lambda digest: (f[digest], digest)) for name, f in sorted(votes.items())}
            self._older = {name: frozenset(f) - {self._digests[name]} for name, f in votes.items() if len(f) > 1}

    def _votes(self, infos: Mapping[WorkerKey, WorkerInfo]) -> Mapping[str, Counter[str]]:
        """By name, for each digest."""
        votes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for key, info in infos.items():
            for name, digest in info.adapters:
                votes[name][digest] += 1 if key not in self._ready else 1 << 20
        for name in self._models_own & votes.keys():
            del votes[name]
            self._complain(name, f"adapter {name!r} has a name of the model itself and is not served; rename it")
        for name, found in votes.items():
            if len(found) > 1:
                self._complain(name, f"workers have {len(found)} different adapters {name!r}; most decide")
        return votes

    def _complain(self, name: str, why: str) -> None:
        if name not in self._complained:
            self._complained.add(name)
            log.warning("%s", why)
