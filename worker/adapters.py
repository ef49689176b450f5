"""Adapters that are loaded, replaced and unloaded while the worker serves.

    load      read and checked on a thread, one at a time  ─>  known to the engine, between two steps  ─>  announced
    replace   the same; what the name stood for before is kept
    unload    announced no more; kept
    kept      for answers that began on it: until no sequence has had it here for a while. One that runs elsewhere all
              that time finds it no more

Each command has a stamp. The latest on a name counts, in whatever order they come; what was unloaded is remembered, so
that routers can tell one another through us. On the event loop; what the engine has is changed on its own thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.config import AdaptersConfig
from engine.model_errors import AdapterError
from worker.core import WorkerCore
from worker.messages import AdaptersSaid, AdapterWord, Code
from worker.repeat import is_fatal, told

if TYPE_CHECKING:
    from engine.adapters.format import Adapter, Pairs

log = logging.getLogger(__name__)

KEPT_S = 60.0  # after the last sequence here: an answer that moves between workers comes back within that
_WAITING = 4  # loads behind the one that reads
_READ_S = 120.0
_MOST_GONE = 1024
_MOST_NAME = 256


class AdapterRefused(Exception):
    """Nothing was changed; the message names cause and fix."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Layers(Protocol):
    """engine/adapters/layers.py"""

    first: tuple[Adapter, ...]
    takes_more: bool

    def read(self, name: str, directory: str) -> tuple[Adapter, Pairs]: ...

    def add(self, adapter: Adapter, pairs: Pairs) -> None: ...

    def drop(self, digest: str) -> None: ...


Read = Callable[[AdapterWord], Awaitable[tuple["Adapter", "Pairs"]]]
OnEngine = Callable[[Callable[[WorkerCore], bool]], Awaitable[bool]]


@dataclass(slots=True)
class _Kept:
    name: str
    since: float


class LiveAdapters:
    def __init__(
        self,
        config: AdaptersConfig,
        layers: Layers | None,
        on_engine: OnEngine,
        clock: Callable[[], float] = time.monotonic,
        read: Read | None = None,
        kept_s: float = KEPT_S,
    ) -> None:
        """`on_engine`: runs a function between two steps and says what it said; False: not in time. `read`: in place of
        reading files.
        """
        self._reading = read or self._from_files
        self._kept_s = kept_s
        self._config = config
        self._layers = layers
        self._on_engine = on_engine
        self._clock = clock
        first: Sequence[Adapter] = () if layers is None else layers.first
        self._words = {a.name: AdapterWord(a.name, a.digest, str(a.directory)) for a in first}
        self._kept: dict[str, _Kept] = {}  # by digest
        self._lost: frozenset[str] = frozenset()  # digests whose files have gone
        self._gone: dict[str, int] = {}
        self._changes = 0
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._waiting = 0
        self.announce: Callable[[], None] = lambda: None  # set by who assembles the worker
        self.loads = {"loaded": 0, "refused": 0}

    def said(self) -> AdaptersSaid:
        return AdaptersSaid(
            tuple(word for word in self._words.values() if word.digest not in self._lost),
            tuple((kept.name, digest) for digest, kept in self._kept.items() if digest not in self._lost),
            tuple(self._gone.items()),
            self._changes,
            self._layers is not None and self._layers.takes_more,
        )

    def counts(self) -> dict[str, float]:
        """From any thread."""
        return {"served": len(self._words), "kept": len(self._kept), "lost": len(self._lost)}

    # Commands.

    async def set(self, word: AdapterWord) -> str:
        """The digest that the name stands for now. Raises AdapterRefused."""
        self._check_stamp(word)
        if not word.digest and not word.directory:
            self._unload(word)
            return ""
        try:
            digest = await self._load(word)
        except AdapterRefused as error:
            self.loads["refused"] += 1
            log.warning("adapter %r from %s is not loaded: %s", word.name, word.directory, error)
            raise
        self.loads["loaded"] += 1
        return digest

    def _check_stamp(self, word: AdapterWord) -> None:
        known = self._words.get(word.name)
        last = self._gone.get(word.name, -1) if known is None else known.stamp
        if word.stamp < last:
            raise AdapterRefused(
                Code.FAILED_PRECONDITION, f"a later command about {word.name!r} was carried out already; repeat yours"
            )

    def _unload(self, word: AdapterWord) -> None:
        before = self._words.pop(word.name, None)
        if before is None and word.stamp <= self._gone.get(word.name, -1):
            return
        self._gone.pop(word.name, None)
        self._gone[word.name] = word.stamp
        while len(self._gone) > _MOST_GONE:
            del self._gone[next(iter(self._gone))]
        self._retire(before)
        log.info("adapter %r is unloaded", word.name)
        self._changed()

    async def _load(self, word: AdapterWord) -> str:
        layers = self._layers
        if layers is None or not layers.takes_more:
            raise AdapterRefused(
                Code.FAILED_PRECONDITION,
                "this worker has no room for more adapters; set engine.adapters.max_rank and start it again",
            )
        if not word.name.strip() or len(word.name) > _MOST_NAME:
            raise AdapterRefused(Code.INVALID_ARGUMENT, f"an adapter's name has 1 to {_MOST_NAME} characters")
        known = self._words.get(word.name)
        if known is not None and known.digest == word.digest and known.stamp == word.stamp and not self._is_lost(known):
            return known.digest  # once more
        if self._waiting > _WAITING:
            raise AdapterRefused(
                Code.RESOURCE_EXHAUSTED, f"{self._waiting} adapters are being loaded here already; repeat in a moment"
            )
        self._waiting += 1
        try:
            async with self._turn:
                return await self._read_and_add(layers, word)
        finally:
            self._waiting -= 1

    async def _read_and_add(self, layers: Layers, word: AdapterWord) -> str:
        adapter, pairs = await self._reading(word)
        if word.digest and adapter.digest != word.digest:
            raise AdapterRefused(
                Code.FAILED_PRECONDITION,
                f"{word.directory} holds other weights here ({adapter.digest[:8]}) than where it was loaded first "
                f"({word.digest[:8]}); copy the same files to all machines",
            )
        digest = adapter.digest
        await self._make_room(word.name, digest)

        def add(core: WorkerCore) -> bool:
            assert core.adapters is not None
            layers.add(adapter, pairs)
            core.adapters.add(digest)
            return True

        try:
            added = await self._on_engine(add)
        except asyncio.CancelledError:  # nobody waits for it any more
            self._leave(word.name, digest)
            raise
        if not added:
            self._leave(word.name, digest)  # it may be added yet
            raise AdapterRefused(
                Code.DEADLINE_EXCEEDED, "no step ended in time; look whether the worker's steps go on, and repeat"
            )
        try:
            self._check_stamp(word)
        except AdapterRefused:  # overtaken while it was read
            self._leave(word.name, digest)
            raise
        before = self._words.pop(word.name, None)
        self._words[word.name] = AdapterWord(word.name, digest, word.directory, word.stamp, word.groups)
        self._gone.pop(word.name, None)
        self._kept.pop(digest, None)
        self._lost -= {digest}
        self._retire(before)
        log.info("adapter %r is loaded from %s: %s, rank %d", word.name, word.directory, digest, adapter.rank)
        self._changed()
        return digest

    async def _from_files(self, word: AdapterWord) -> tuple[Adapter, Pairs]:
        """Raises AdapterRefused."""
        assert self._layers is not None
        try:
            async with asyncio.timeout(_READ_S):
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._thread, self._read, self._layers, word)
        except AdapterError as error:
            raise AdapterRefused(Code.INVALID_ARGUMENT, " ".join(str(error).split())) from None
        except TimeoutError:
            why = f"{word.directory} was not read within {_READ_S:g} s; look whether its disk answers"
            raise AdapterRefused(Code.DEADLINE_EXCEEDED, why) from None
        except BaseException as error:  # of libraries, in Rust among others, and of memory
            if is_fatal(error) or isinstance(error, asyncio.CancelledError):
                raise
            why = f"{word.directory} cannot be read ({told(error)}); save it again, or give the worker more memory"
            raise AdapterRefused(Code.INVALID_ARGUMENT, why) from error

    def _read(self, layers: Layers, word: AdapterWord) -> tuple[Adapter, Pairs]:
        """On a thread. Raises AdapterError."""
        directory = Path(word.directory)
        if not directory.is_absolute():
            raise AdapterError(f"directory {word.directory[:200]!r} is not absolute; name it from the root on")
        allowed = self._config.directories
        try:
            real = directory.resolve()
            if allowed and not any(real.is_relative_to(Path(one).resolve()) for one in allowed):
                raise AdapterError(
                    f"{word.directory[:200]} is not below {', '.join(allowed)}; move it there, or add its place to "
                    "engine.adapters.directories"
                )
            return layers.read(word.name, str(real))
        except (OSError, ValueError, RuntimeError) as error:  # names that no system takes, loops of links
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(f"{word.directory[:200]!r} cannot be read: {error}; name another directory") from None

    async def _make_room(self, name: str, digest: str) -> None:
        """For one more."""
        digests = {one.digest for one in self._words.values()} | self._kept.keys()
        if name not in self._words and len(self._words) >= self._config.most:
            digests = set()  # more names are not to be had by dropping what is kept
        elif digest in digests or len(digests) < self._config.most:
            return
        for other in sorted(self._kept, key=lambda other: self._kept[other].since) if digests else ():
            if await self._drop(other):
                return
        raise AdapterRefused(
            Code.RESOURCE_EXHAUSTED,
            f"there are {self._config.most} adapters, with those that answers still need; unload one "
            "(`diptych adapters unload`), or raise engine.adapters.most and start the worker again",
        )

    def _retire(self, before: AdapterWord | None) -> None:
        if before is not None:
            self._leave(before.name, before.digest)

    def _leave(self, name: str, digest: str) -> None:
        """No name stands for it, unless one does: it goes when nobody needs it."""
        if not any(word.digest == digest for word in self._words.values()):
            self._kept[digest] = _Kept(name, self._clock())

    def _is_lost(self, word: AdapterWord) -> bool:
        return word.digest in self._lost

    def _changed(self) -> None:
        self._changes += 1
        self.announce()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    # From time to time.

    async def look(self, lost: frozenset[str]) -> None:
        """`lost`: digests that cannot be loaded into a slot any more. Drops what nobody needs."""
        lost &= {word.digest for word in self._words.values()} | self._kept.keys()
        if lost != self._lost:
            for word in self._words.values():
                if word.digest in lost - self._lost:
                    log.error("adapter %r is lost and no longer announced: its files are gone or others", word.name)
            self._lost = lost
            self._changed()
        if not self._kept:
            return
        used: set[str] = set()
        asked = list(self._kept)

        def uses(core: WorkerCore) -> bool:
            used.update(digest for digest in asked if _uses(core, digest))
            return True

        if not await self._on_engine(uses):
            return
        now = self._clock()
        for digest in used & self._kept.keys():
            self._kept[digest].since = now
        if not any(now - kept.since >= self._kept_s for kept in self._kept.values()):
            return
        async with self._turn:  # nothing comes while something goes
            for digest, kept in list(self._kept.items()):
                if now - kept.since >= self._kept_s:
                    await self._drop(digest)

    async def _drop(self, digest: str) -> bool:
        """False: it is in use, or no step ended in time."""
        layers = self._layers
        assert layers is not None

        def drop(core: WorkerCore) -> bool:
            assert core.adapters is not None
            if _uses(core, digest):
                return False
            core.adapters.drop(digest)
            layers.drop(digest)
            return True

        if digest not in self._kept or not await self._on_engine(drop):
            return False
        kept = self._kept.pop(digest, None)
        if kept is not None:
            log.info("adapter %r, %s, is dropped: no answer needs it", kept.name, digest)
            self._changed()
        return True


def _uses(core: WorkerCore, digest: str) -> bool:
    return core.uses_adapter(digest) or (core.adapters is not None and core.adapters.users(digest) > 0)
