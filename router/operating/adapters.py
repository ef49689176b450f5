"""LoRA adapters of a running cluster: loaded, replaced, unloaded, and told to workers that come later.

    load     one decode worker reads it first: its digest is what all others must find, too. Then the name stands for it
             here and, by what workers say, at other routers; the others are told at once
    unload   the name stands for nothing at once; then workers are told
    later    a worker that has not heard of the latest word on a name is told it, again and again while it cannot

A refusal by RequestRefused has changed nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import posixpath
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from router.errors import Code, Failure, refuse
from router.placement.adapter_words import MOST_GROUPS, MOST_NAME, MOST_PATH, AdapterWord
from router.placement.adapters import Adapters
from router.placement.cluster import Cluster, Role, WorkerEntry, WorkerState
from router.placement.view import WorkerKey

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0
LONGEST_S = 600.0
_LOOK_S = 0.25
_AGAIN_S = (2.0, 5.0, 15.0, 60.0)
_FIRST_TRIES = 3
_LATELY_S = 300.0  # who failed to read one first is asked last
_AT_ONCE = 16  # workers that are told at a time
_MOST_COMMANDS = 4
_NAMED = 8

Tell = Callable[[WorkerKey, AdapterWord, float], Awaitable[tuple[str, Failure | None]]]


@dataclass(frozen=True, slots=True)
class OnWorker:
    worker_id: str
    has: bool
    in_slot: bool
    error: str = ""  # why it does not have it, where it should


@dataclass(frozen=True, slots=True)
class Served:
    """`word` without a stamp: it came with the settings of workers."""

    word: AdapterWord
    decode: bool
    prefill: bool
    workers: tuple[OnWorker, ...]


@dataclass(slots=True)
class _Attempt:
    """The last one that failed, of one worker and one word."""

    stamp: int
    error: str
    again_at: float
    count: int = 1


class AdapterOperator:
    """`tell`: has a worker do it. `wall_ns`: the time of day, of stamps."""

    def __init__(
        self,
        cluster: Cluster,
        adapters: Adapters,
        tell: Tell,
        clock: Callable[[], float],
        wall_ns: Callable[[], int],
    ) -> None:
        self._cluster = cluster
        self._adapters = adapters
        self._tell = tell
        self._clock = clock
        self._wall_ns = wall_ns
        self._failed: dict[tuple[WorkerKey, str], _Attempt] = {}
        self._failed_first: dict[WorkerKey, float] = {}  # when, last
        self._telling: set[tuple[WorkerKey, str]] = set()
        self._seen: object = None  # by the last look
        self._due = 0.0  # when it has to look again, though all is as it was
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: set[str] = set()  # names that a command is about
        self._gate = asyncio.Semaphore(_AT_ONCE)

    # Commands.

    async def load(
        self, name: str, directory: str, groups: Sequence[str] = (), timeout_s: float = TIMEOUT_S
    ) -> tuple[Served, str]:
        """What is served now, and the digest that the name stood for before. Raises RequestRefused."""
        self._check(name, directory, groups, timeout_s)
        known = self._cluster.workers.values()
        ready = [e for e in known if e.state is WorkerState.READY and (not groups or e.info.group in groups)]
        able = [e for e in ready if e.info.adapters.takes_more]
        if not any(e.role is Role.DECODE for e in able):
            decoding = sum(e.role is Role.DECODE for e in ready)
            there = f"none of the {decoding} ready decode workers" if decoding else "no ready decode worker"
            of = f" of {' or '.join(groups)}" if groups else ""
            why = f"{there}{of} has room for more adapters; set engine.adapters.max_rank and start them again"
            raise refuse(Code.FAILED_PRECONDITION, why, field="name")
        async with _Turn(self._busy, name):
            before = self._adapters.digests().get(name, "")
            deadline = self._clock() + timeout_s
            word = AdapterWord(name, "", directory, self._stamp(), tuple(groups))
            log.info("operator: load adapter %r from %s", name, directory)
            word, first = await self._first([e for e in able if e.role is Role.DECODE], word, deadline)
            self._adapters.command(word)
            await asyncio.gather(*(self._have(e.key, word, deadline) for e in able if e.key != first))
        return self._served(word), "" if before == word.digest else before

    async def _first(
        self, able: Sequence[WorkerEntry], word: AdapterWord, deadline: float
    ) -> tuple[AdapterWord, WorkerKey]:
        causes: list[str] = []
        last = Failure(Code.DEADLINE_EXCEEDED, "no time was left")
        lately = self._clock() - _LATELY_S
        self._failed_first = {
            k: at for k, at in self._failed_first.items() if at > lately and k in self._cluster.workers
        }
        asked = sorted(able, key=lambda e: self._failed_first.get(e.key, lately))[:_FIRST_TRIES]
        for i, entry in enumerate(asked):
            left = deadline - self._clock()
            if left <= 0:
                break
            one = replace(word, stamp=word.stamp + i)  # what ends late, after all, is not the latest
            digest, failure = await self._ask(entry.key, one, left / (len(asked) - i))
            if failure is None and digest:
                self._failed_first.pop(entry.key, None)
                return replace(one, digest=digest), entry.key
            self._failed_first[entry.key] = self._clock()
            last = failure or Failure(Code.INTERNAL, "it named no digest; look at its log")
            causes.append(f"{entry.key.worker_id}: {last.message}")
        more = f"; {len(able) - len(causes)} others were not asked" if len(able) > len(causes) else ""
        raise refuse(
            last.code, f"no decode worker could load it: {'; '.join(causes) or last.message}{more}", field="directory"
        )

    async def unload(self, name: str) -> tuple[str, tuple[OnWorker, ...]]:
        """The digest that the name stood for, and the workers that have not done it yet. Raises RequestRefused."""
        digest = self._adapters.digests().get(name, "")
        if not digest:
            there = ", ".join(list(self._adapters.digests())[:_NAMED]) or "none"
            raise refuse(Code.NOT_FOUND, f"no adapter {name[:100]!r}; there are: {there}", field="name")
        async with _Turn(self._busy, name):
            log.info("operator: unload adapter %r", name)
            word = AdapterWord(name, "", "", self._stamp())
            self._adapters.command(word)
            deadline = self._clock() + TIMEOUT_S
            having = [e.key for e in self._ready() if e.info.adapters.word(name) is not None]
            await asyncio.gather(*(self._have(key, word, deadline) for key in having))
        return digest, tuple(w for w in self._on_workers(word, digest) if w.error)

    def listed(self) -> list[Served]:
        words = self._adapters.words()
        found: list[Served] = []
        for name, digest in self._adapters.digests().items():
            word = words.get(name)
            if word is None or word.digest != digest:
                word = self._announced(name, digest)
            found.append(self._served(word))
        return found

    def _announced(self, name: str, digest: str) -> AdapterWord:
        for entry in self._cluster.workers.values():
            word = entry.info.adapters.word(name)
            if word is not None and word.digest == digest:
                return word
        return AdapterWord(name, digest, "")

    def _check(self, name: str, directory: str, groups: Sequence[str], timeout_s: float) -> None:
        if not name.strip() or len(name) > MOST_NAME or not name.isprintable():
            why = f"an adapter's name has 1 to {MOST_NAME} printable characters, and it is {name[:100]!r}"
            raise refuse(Code.INVALID_ARGUMENT, why, field="name")
        if name in self._adapters.models_own:
            why = f"{name!r} is a name of the model itself; give the adapter another"
            raise refuse(Code.ALREADY_EXISTS, why, field="name")
        if len(directory) > MOST_PATH or not posixpath.isabs(directory) or "\0" in directory:
            why = f"directory {directory[:200]!r} is no absolute path; name one that all workers can read"
            raise refuse(Code.INVALID_ARGUMENT, why, field="directory")
        if len(groups) > MOST_GROUPS:
            why = f"{len(groups)} groups are named, and {MOST_GROUPS} is the limit; name none for all workers"
            raise refuse(Code.INVALID_ARGUMENT, why, field="groups")
        if not 0.1 <= timeout_s <= LONGEST_S:
            why = f"the timeout is {timeout_s:g} s; use 0.1 to {LONGEST_S:g}"
            raise refuse(Code.INVALID_ARGUMENT, why, field="timeout_ms")

    def _stamp(self) -> int:
        """Later than all that were heard of, whatever clocks say."""
        return max([self._wall_ns(), *(word.stamp + 1 for word in self._adapters.words().values())])

    # What is there.

    def _ready(self) -> list[WorkerEntry]:
        return [entry for role in Role for entry in self._cluster.ready(role)]

    def _served(self, word: AdapterWord) -> Served:
        having = [(e, e.info.adapters.word(word.name)) for e in self._ready()]
        roles = {e.role for e, own in having if own is not None and own.digest == word.digest}
        return Served(word, Role.DECODE in roles, Role.PREFILL in roles, self._on_workers(word, word.digest))

    def _on_workers(self, word: AdapterWord, digest: str) -> tuple[OnWorker, ...]:
        found: list[OnWorker] = []
        for e in sorted(self._ready(), key=lambda e: e.key):
            has = any(one.name == word.name and one.digest == digest for one in e.info.adapters.adapters)
            in_slot = e.load is not None and digest in e.load.loaded_adapters
            failed = self._failed.get((e.key, word.name))
            error = "" if failed is None or failed.stamp != word.stamp else failed.error
            if not has and not error and word.stamp and word.digest and not e.info.adapters.takes_more:
                error = "it has no room for more adapters; set engine.adapters.max_rank and start it again"
            found.append(OnWorker(e.key.worker_id, has, in_slot, error))
        return tuple(found)

    # Workers that are told.

    async def _ask(self, key: WorkerKey, word: AdapterWord, timeout_s: float) -> tuple[str, Failure | None]:
        try:
            return await self._tell(key, word, timeout_s)
        except Exception as error:
            log.exception("worker %s cannot be told of adapter %r", key.worker_id, word.name)
            return "", Failure(Code.INTERNAL, f"it cannot be told ({error}); look at this router's log")

    async def _have(self, key: WorkerKey, word: AdapterWord, deadline: float) -> None:
        """Remembers why not."""
        at = key, word.name
        self._telling.add(at)
        try:
            async with self._gate:
                left = deadline - self._clock()
                late = Failure(Code.DEADLINE_EXCEEDED, "no time was left to tell it; it is told again")
                _, failure = await self._ask(key, word, left) if left > 0 else ("", late)
        finally:
            self._telling.discard(at)
            self._due = min(self._due, self._clock() + _AGAIN_S[0])
        if failure is None:
            self._failed.pop(at, None)
            return
        before = self._failed.get(at)
        count = before.count + 1 if before is not None and before.stamp == word.stamp else 1
        again_at = self._clock() + _AGAIN_S[min(count, len(_AGAIN_S)) - 1]
        self._failed[at] = _Attempt(word.stamp, failure.message, again_at, count)
        if before is None or before.error != failure.message:
            log.warning("worker %s: adapter %r: %s", key.worker_id, word.name, failure.message)

    async def run(self) -> None:
        """For as long as the router lives."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self.look()

    def look(self) -> None:
        """Tells workers what they have not heard."""
        now, words, ready = self._clock(), self._adapters.words(), self._ready()
        seen = self._adapters.changes(), tuple(entry.key for entry in ready)
        if not words or (seen == self._seen and now < self._due):
            return
        self._seen, self._due = seen, math.inf
        for at in [at for at in self._failed if at[0] not in self._cluster.workers]:
            del self._failed[at]
        for entry in ready:
            stamp_of = entry.info.adapters.stamp_of
            for word in words.values():
                if word.stamp <= stamp_of(word.name) or not self._concerns(word, entry):
                    continue
                at = entry.key, word.name
                if word.name in self._busy or at in self._telling or len(self._telling) >= _AT_ONCE:
                    self._due = now
                    continue
                failed = self._failed.get(at)
                if failed is not None and failed.stamp == word.stamp and now < failed.again_at:
                    self._due = min(self._due, failed.again_at)
                    continue
                self._telling.add(at)
                task = asyncio.create_task(self._have(entry.key, word, now + TIMEOUT_S))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    @staticmethod
    def _concerns(word: AdapterWord, entry: WorkerEntry) -> bool:
        said = entry.info.adapters
        if not word.digest:
            return said.word(word.name) is not None
        return said.takes_more and word.is_for(entry.info.group)


class _Turn:
    """One command a name at a time, and few in all."""

    def __init__(self, busy: set[str], name: str) -> None:
        self._busy, self._name = busy, name

    async def __aenter__(self) -> None:
        if self._name in self._busy:
            why = f"another command about {self._name[:100]!r} is under way; repeat when it has ended"
            raise refuse(Code.FAILED_PRECONDITION, why, field="name")
        if len(self._busy) >= _MOST_COMMANDS:
            why = f"{len(self._busy)} adapters are being loaded or unloaded; repeat when one has ended"
            raise refuse(Code.RESOURCE_EXHAUSTED, why, field="name")
        self._busy.add(self._name)

    async def __aexit__(self, *_: object) -> None:
        self._busy.discard(self._name)
