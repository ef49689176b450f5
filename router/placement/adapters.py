"""Which adapters there are, by the workers that have them. Names are aliases: a request is given a digest once, when it
comes, and every worker that it meets must have announced that one.

A name stands for what the latest command on it said, be it nothing. Of names that came with settings, workers may
disagree: there it is what most workers that are ready have.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping

from router.placement.adapter_words import AdaptersSaid, AdapterWord
from router.placement.cluster import Cluster, WorkerInfo
from router.placement.view import WorkerKey

log = logging.getLogger(__name__)

NOBODY: frozenset[WorkerKey] = frozenset()
_SHOWN = 8  # workers that have it loaded, as hints to a placement
_MOST_WORDS = 8192


class Adapters:
    def __init__(self, cluster: Cluster, models_own: Collection[str]) -> None:
        """`models_own`: names that requests have for the model alone; no adapter goes by one."""
        self._cluster = cluster
        self._models_own = frozenset(models_own)
        self._words: dict[str, AdapterWord] = {}  # the latest on each name, of commands
        self._commands = 0
        self._at: tuple[int, ...] = ()
        self._digests: dict[str, str] = {}
        self._older: dict[str, frozenset[str]] = {}
        self._ready: dict[WorkerKey, frozenset[str]] = {}
        self._heard: dict[WorkerKey, AdaptersSaid] = {}  # words of these are known
        self._complained: set[str] = set()

    def digests(self) -> Mapping[str, str]:
        """By name. A name stays known while its workers are lost, or none is there at all."""
        self._look()
        return self._digests

    def older(self) -> Mapping[str, frozenset[str]]:
        """By name, what else workers have under it: answers that began on one of these may go on with it."""
        self._look()
        return self._older

    def changes(self) -> tuple[int, ...]:
        """While it is the same, so is all else that is asked for here."""
        self._look()
        return self._at

    @property
    def models_own(self) -> frozenset[str]:
        return self._models_own

    def words(self) -> Mapping[str, AdapterWord]:
        """By name, the latest that was heard from an operator or a worker. None about names that came with settings."""
        self._look()
        return self._words

    def command(self, word: AdapterWord) -> None:
        """From now on."""
        self._hear(word)
        self._commands += 1

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

    def load_ms(self, digest: str) -> Callable[[WorkerKey], float] | None:
        """Of a worker: what putting it into a slot takes there, as measured lately. 0: it is in one, or nothing was
        measured. None: there is no adapter.
        """
        if not digest:
            return None
        workers = self._cluster.workers

        def cost(key: WorkerKey) -> float:
            entry = workers.get(key)
            load = None if entry is None else entry.load
            return 0.0 if load is None or digest in load.loaded_adapters else load.adapter_load_ms

        return cost

    def _look(self) -> None:
        view = self._cluster.view()
        at = view.decode.changes, view.prefill.changes, self._cluster.adapter_changes, self._commands
        if at == self._at:
            return
        self._at = at
        infos = {key: entry.info for key, entry in self._cluster.workers.items()}
        self._ready = {
            w.key: frozenset(_digests_of(infos[w.key])) for pool in (view.decode, view.prefill) for w in pool
        }
        for key, info in infos.items():
            if info.adapters is self._heard.get(key):
                continue
            for word in info.adapters.adapters:
                self._hear(word)
            for name, stamp in info.adapters.gone:
                known = self._words.get(name)
                if known is None or stamp > known.stamp:
                    self._hear(AdapterWord(name, "", "", stamp))
        self._heard = {key: info.adapters for key, info in infos.items()}
        if infos:
            votes = self._votes(infos)
            self._digests = {name: max(f, key=lambda digest: (f[digest], digest)) for name, f in votes.items()}
            for word in self._words.values():
                if word.digest:
                    self._digests[word.name] = word.digest
                else:
                    self._digests.pop(word.name, None)
            self._digests = dict(sorted(self._digests.items()))
            kept: defaultdict[str, set[str]] = defaultdict(set)
            for info in infos.values():
                for name, digest in info.adapters.kept:
                    kept[name].add(digest)
            older = {name: (kept[name] | set(votes.get(name, ()))) - {digest} for name, digest in self._digests.items()}
            self._older = {name: frozenset(digests) for name, digests in older.items() if digests}
        for name in [name for name in self._digests if name in self._words and not self._words[name].digest]:
            del self._digests[name]
            self._older.pop(name, None)

    def _hear(self, word: AdapterWord) -> None:
        known = self._words.get(word.name)
        if word.stamp <= (0 if known is None else known.stamp) or word.name in self._models_own:
            return
        self._words[word.name] = word
        if len(self._words) > _MOST_WORDS:
            del self._words[
                min(self._words, key=lambda name: (bool(self._words[name].digest), self._words[name].stamp))
            ]

    def _votes(self, infos: Mapping[WorkerKey, WorkerInfo]) -> Mapping[str, Counter[str]]:
        """By name, for each digest."""
        votes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for key, info in infos.items():
            for word in info.adapters.adapters:
                votes[word.name][word.digest] += 1 if key not in self._ready else 1 << 20
        for name in self._models_own & votes.keys():
            del votes[name]
            self._complain(name, f"adapter {name!r} has a name of the model itself and is not served; rename it")
        for name, found in votes.items():
            if len(found) > 1:
                self._complain(
                    name, f"workers have {len(found)} different adapters {name!r}; the latest command decides, or most"
                )
        return votes

    def _complain(self, name: str, why: str) -> None:
        if name not in self._complained:
            self._complained.add(name)
            log.warning("%s", why)


def _digests_of(info: WorkerInfo) -> Iterator[str]:
    """What answers may go on with there; new ones begin with some of them."""
    yield from (word.digest for word in info.adapters.adapters)
    yield from (digest for _, digest in info.adapters.kept)
