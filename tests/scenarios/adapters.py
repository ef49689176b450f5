"""Adapters that come and go while answers run: an eighth of the seeds loads, replaces and unloads them at odd moments.

What a worker has is kept by its own code (worker/adapters.py), what names stand for by the router's. Mirrored here,
because it is IO in the product: reading files, and carrying commands (router/operating/adapters.py, clients.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from engine.config import AdaptersConfig
from router.placement.adapter_words import AdaptersSaid, AdapterWord
from router.wire import said_from_wire
from worker.adapters import AdapterRefused, LiveAdapters
from worker.core import WorkerCore
from worker.messages import AdapterWord as Told
from worker.wire import said_to_wire

if TYPE_CHECKING:
    from tests.scenarios.nodes import SimRouter, SimWorker, World

SLOTS = 2
NAMES = ("ann", "bob", "cid")
_VERSIONS = 3
_LOOK_S = 0.05


def has_adapters(seed: int) -> bool:
    return seed % 8 == 3


def directory_of(name: str, version: int) -> str:
    return f"/{name}/{version}"


class AdaptersOfWorker:
    """The real keeper of what a worker has, over a model that notes what it was given."""

    def __init__(self, worker: SimWorker, kept_s: float) -> None:
        self._worker = worker
        self.live = LiveAdapters(
            AdaptersConfig(max_rank=1, slots=SLOTS),
            worker.model,  # type: ignore[arg-type]
            self._on_engine,
            lambda: worker.world.clock.now,
            read=self._read,
            kept_s=kept_s,
        )
        self.live.announce = self._announce

    async def _on_engine(self, question: Callable[[WorkerCore], bool]) -> bool:
        return question(self._worker.core)

    async def _read(self, word: Told) -> Any:
        adapter = SimpleNamespace(name=word.name, digest=word.directory, directory=Path(word.directory), rank=1)
        return adapter, {}

    def said(self) -> AdaptersSaid:
        return said_from_wire(said_to_wire(self.live.said()))

    def hear(self, word: AdapterWord) -> None:
        try:
            _run(self.live.set(Told(word.name, word.digest, word.directory, word.stamp, word.groups)))
        except AdapterRefused as error:
            self._worker.world.say(f"{self._worker.peer.worker_id}: {word.name}: {error}")

    def look(self) -> None:
        _run(self.live.look(frozenset()))

    def _announce(self) -> None:
        worker = self._worker
        key, said = worker.info.key, self.said()
        for router in list(worker.world.routers.values()):
            cluster = router.dispatcher.cluster
            worker.world.clock.at(0.001, lambda c=cluster: c.said_adapters(key, said))


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Nothing in it waits here."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits for something")


@dataclass
class Adapting:
    """Of one scenario. Its draws are of its own: the others stay as they are."""

    seed: int
    world: World
    busy: Callable[[], bool]  # answers are still to come
    rng: random.Random = field(init=False)
    commands: list[tuple[float, str]] = field(default_factory=list)  # when, on which name
    _stamp: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(f"adapters {self.seed}")
        self.every_s = self.rng.choice((0.02, 0.1, 0.5))
        self.kept_s = self.rng.choice((0.0, 0.1, 1.0))
        self.share = self.rng.choice((0.5, 0.9))  # of requests that name one

    def begin(self) -> None:
        """All names are loaded before anybody asks."""
        for name in NAMES:
            self._command(name, directory_of(name, 0))
        self.world.clock.at(_LOOK_S, self._look)

    def go_on(self) -> None:
        self.world.clock.at(self.every_s, self._act)

    def _act(self) -> None:
        if not self.busy():
            return
        self.world.clock.at(self.every_s * self.rng.uniform(0.5, 1.5), self._act)
        name = self.rng.choice(NAMES)
        unload = self.rng.random() < 0.3
        self._command(name, "" if unload else directory_of(name, self.rng.randrange(_VERSIONS)))

    def _command(self, name: str, directory: str) -> None:
        routers = sorted(self.world.routers)
        if not routers:
            return
        router = self.world.routers[self.rng.choice(routers)]
        self._stamp += 1
        word = AdapterWord(name, directory, directory, self._stamp)
        self.commands.append((self.world.clock.now, name))
        self.world.say(f"{name} is to be {directory or 'nothing'}")
        router.dispatcher.adapters.command(word)
        for worker in list(self.world.workers.values()):
            self._tell(router, worker, word)

    def changed(self, name: str, since: float) -> bool:
        return any(at >= since and name == other for at, other in self.commands)

    def _look(self) -> None:
        """Whoever has not heard the latest is told; whoever keeps something looks whether it may go."""
        self.world.clock.at(_LOOK_S, self._look)
        for worker in list(self.world.workers.values()):
            if worker.adapters is not None and worker.stalled_until <= self.world.clock.now:
                worker.adapters.look()
        for router in list(self.world.routers.values()):
            cluster = router.dispatcher.cluster
            for word in router.dispatcher.adapters.words().values():
                for worker in list(self.world.workers.values()):
                    entry = cluster.workers.get(worker.info.key)
                    if entry is not None and entry.info.adapters.stamp_of(word.name) < word.stamp:
                        self._tell(router, worker, word)

    def _tell(self, router: SimRouter, worker: SimWorker, word: AdapterWord) -> None:
        """Takes as long as reading does, and reaches nobody over a cut."""

        def arrives() -> None:
            weather, now = self.world.weather, self.world.clock.now
            reached = weather.healed_at(router.name, worker.peer.worker_id, now) <= now
            if worker.alive and worker.adapters is not None and worker.stalled_until <= now and reached:
                worker.adapters.hear(word)

        self.world.clock.at(self.rng.choice((0.001, 0.03)), arrives)
