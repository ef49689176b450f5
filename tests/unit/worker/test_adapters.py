"""Adapters that come and go under a real core: what is announced, what is kept, and that nothing stays for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diptych.v1 import worker_pb2

from engine.adapters.slots import AdapterSlots
from engine.block_pool import BlockPool
from engine.config import AdaptersConfig
from engine.core import EngineCore
from engine.model_errors import AdapterError
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, StepResult
from worker.adapters import KEPT_S, AdapterRefused, LiveAdapters
from worker.core import WorkerCore
from worker.messages import AdapterWord, Code, RouterCommands, RouterConnected, StartSequence
from worker.service import WorkerServicer


class Layers:
    """What files hold, by directory: a digest, or why they cannot be read."""

    def __init__(self, first: dict[str, str], files: dict[str, str | Exception], *, takes_more: bool = True) -> None:
        made = [SimpleNamespace(name=n, digest=d, directory=Path(f"/start/{n}"), rank=4) for n, d in first.items()]
        self.first: Any = tuple(made)
        self.takes_more = takes_more
        self.files = files
        self.has = set(first.values())
        self.hold: Callable[[], None] = lambda: None

    def read(self, name: str, directory: str) -> Any:
        self.hold()
        found = self.files.get(directory, AdapterError(f"{directory} has no adapter_config.json"))
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(name=name, digest=found, directory=Path(directory), rank=4), {}

    def add(self, adapter: Any, pairs: Any) -> None:
        self.has.add(adapter.digest)

    def drop(self, digest: str) -> None:
        self.has.discard(digest)


class Worker:
    def __init__(self, first: dict[str, str] | None = None, *, takes_more: bool = True, **config: Any) -> None:
        slots = AdapterSlots(1, (first or {}).values())
        self.core = WorkerCore(
            EngineCore(EngineLimits(4, 16, 8, 32, 64, 100), BlockPool(64), adapters=slots), report_every_s=1.0
        )
        self.layers = Layers(first or {}, {f"/{d * 2}": d for d in "abcdefgh"}, takes_more=takes_more)
        self.now = 0.0
        self.announced = 0
        self.steps_end = True
        given = AdaptersConfig(max_rank=8, **config)
        self.live = LiveAdapters(given, self.layers, self._on_engine, lambda: self.now)
        self.live.announce = self._announce
        self.core.handle(RouterConnected(1), 0.0)

    async def _on_engine(self, question: Callable[[WorkerCore], bool]) -> bool:
        return self.steps_end and question(self.core)

    def _announce(self) -> None:
        self.announced += 1

    async def load(self, name: str, directory: str, stamp: int, digest: str = "") -> str:
        return await self.live.set(AdapterWord(name, digest, directory, stamp))

    async def unload(self, name: str, stamp: int) -> None:
        assert await self.live.set(AdapterWord(name, "", "", stamp)) == ""

    def names(self) -> dict[str, str]:
        return {word.name: word.digest for word in self.live.said().adapters}

    def kept(self) -> set[str]:
        return {digest for _, digest in self.live.said().kept}

    def start(self, number: int, digest: str) -> None:
        start = StartSequence(number, f"r{number}", [5, 6, 7], (), SamplingParams(max_tokens=4), adapter=digest)
        self.core.handle(RouterCommands(1, (start,), 0.0), 0.0)

    def step(self) -> None:
        plan = self.core.schedule(0.0)
        if plan is not None:
            result = StepResult(tuple(7 if item.sample else None for item in plan.items), (None,) * len(plan.items))
            self.core.commit(plan, result, 0.0, 0.1)

    def errors(self) -> list[str]:
        outbox = self.core.take_outbox()
        return [] if outbox is None else [end.error for end in outbox.links[1].ends if end.error]

    async def look(self, lost: str = "") -> None:
        await self.live.look(frozenset(lost))
        assert self.core.adapters is not None
        assert self.layers.has == self.core.adapters.digests, "the runner and the engine know the same"
        assert self.layers.has == set(self.names().values()) | self.kept() | (set(lost) & self.layers.has)


async def refused(doing: Any, code: int, why: str) -> None:
    with pytest.raises(AdapterRefused, match=why) as raised:
        await doing
    assert raised.value.code == code


async def test_one_is_loaded_replaced_and_unloaded_and_who_began_on_it_ends_on_it() -> None:
    worker = Worker({"sql": "a"})
    assert await worker.load("poet", "/bb", 10) == "b"
    assert worker.names() == {"sql": "a", "poet": "b"}
    worker.start(1, "b")
    worker.step()
    assert await worker.load("poet", "/cc", 20) == "c"
    assert worker.names() == {"sql": "a", "poet": "c"}
    assert worker.kept() == {"b"}
    worker.start(2, "b")  # a request that was on its way
    await worker.unload("poet", 30)
    assert worker.names() == {"sql": "a"}
    assert worker.kept() == {"b", "c"}
    assert worker.live.said().gone == (("poet", 30),)
    assert worker.announced == 3
    for _ in range(3):
        worker.now += KEPT_S
        await worker.look()
        assert "b" in worker.kept(), "two answers have it"
    assert worker.kept() == {"b"}
    for _ in range(9):
        worker.step()
    assert worker.core.is_idle()
    assert worker.errors() == []
    worker.now += KEPT_S
    await worker.look()
    assert worker.layers.has == {"a"}
    worker.start(3, "b")
    assert "there is no adapter b here, or no more" in worker.errors()[0]


async def test_the_latest_command_counts_whatever_order_they_come_in() -> None:
    worker = Worker()
    await worker.load("x", "/aa", 20)
    await refused(worker.load("x", "/bb", 10), Code.FAILED_PRECONDITION, "a later command")
    await refused(worker.unload("x", 19), Code.FAILED_PRECONDITION, "a later command")
    await worker.unload("x", 30)
    await refused(worker.load("x", "/bb", 25), Code.FAILED_PRECONDITION, "a later command")
    assert worker.names() == {}
    changes = worker.live.said().changes
    await worker.unload("x", 30)
    assert await worker.load("x", "/aa", 40, "a") == "a"
    assert await worker.load("x", "/aa", 40, "a") == "a"
    assert worker.live.said().changes == changes + 1, "what was done already is not done again"
    assert worker.kept() == set()
    assert worker.live.said().gone == ()


async def test_a_load_that_is_overtaken_leaves_nothing() -> None:
    worker = Worker()
    loop = asyncio.get_running_loop()
    unloaded: list[Any] = []
    worker.layers.hold = lambda: unloaded.append(
        asyncio.run_coroutine_threadsafe(worker.unload("x", 20), loop).result()
    )
    await refused(worker.load("x", "/aa", 10), Code.FAILED_PRECONDITION, "a later command")
    assert worker.names() == {}
    worker.now += KEPT_S
    await worker.look()
    assert worker.layers.has == set()


async def test_what_cannot_be_loaded_changes_nothing() -> None:
    worker = Worker({"sql": "a"})
    worker.layers.files["/bad"] = AdapterError("adapter 'sql' cannot be served: it is a DoRA adapter")
    worker.layers.files["/odd"] = MemoryError("no room")
    invalid = Code.INVALID_ARGUMENT
    await refused(worker.load("sql", "/bad", 1), invalid, "it is a DoRA adapter")
    await refused(worker.load("sql", "/odd", 1), invalid, "cannot be read .MemoryError: no room.")
    await refused(worker.load("sql", "cc", 1), invalid, "is not absolute")
    await refused(worker.load("sql", "/a\0b", 1), invalid, "cannot be read")
    await refused(worker.load(" ", "/cc", 1), invalid, "has 1 to 256 characters")
    await refused(worker.load("sql", "/cc", 1, "f"), Code.FAILED_PRECONDITION, "holds other weights here")
    worker.steps_end = False
    await refused(worker.load("sql", "/cc", 1), Code.DEADLINE_EXCEEDED, "no step ended in time")
    worker.steps_end = True
    assert worker.names() == {"sql": "a"}
    assert worker.live.loads == {"loaded": 0, "refused": 7}
    fixed = Worker({"sql": "a"}, takes_more=False)
    await refused(fixed.load("sql", "/cc", 1), Code.FAILED_PRECONDITION, "set engine.adapters.max_rank")
    await fixed.unload("sql", 1)
    assert fixed.names() == {}


async def test_only_from_below_the_directories_that_are_named(tmp_path: Path) -> None:
    worker = Worker(directories=(str(tmp_path / "in"),))
    for place in ("in", "out"):
        (tmp_path / place).mkdir()
        worker.layers.files[str(tmp_path / place / "x")] = "a"
    (tmp_path / "in" / "way").symlink_to(tmp_path / "out")
    for outside in ("out/x", "in/../out/x", "in/way/x"):
        await refused(worker.load("x", str(tmp_path / outside), 1), Code.INVALID_ARGUMENT, "is not below")
    assert await worker.load("x", str(tmp_path / "in" / "x"), 1) == "a"


async def test_there_is_a_bound_and_what_nobody_needs_makes_room() -> None:
    worker = Worker(most=2)
    await worker.load("x", "/aa", 1)
    await worker.load("y", "/bb", 2)
    await refused(worker.load("z", "/cc", 3), Code.RESOURCE_EXHAUSTED, "unload one")
    assert await worker.load("y", "/bb", 4) == "b"
    worker.start(1, "a")
    await worker.unload("x", 5)
    await refused(worker.load("z", "/cc", 6), Code.RESOURCE_EXHAUSTED, "raise engine.adapters.most")
    for _ in range(5):
        worker.step()
    assert await worker.load("z", "/cc", 7) == "c"
    await worker.look()
    assert worker.layers.has == {"b", "c"}
    await refused(worker.load("w", "/bb", 8), Code.RESOURCE_EXHAUSTED, "unload one")


async def test_no_more_than_a_few_wait_for_a_load() -> None:
    worker = Worker()
    results = await asyncio.gather(*(worker.load(f"n{i}", "/aa", i + 1) for i in range(9)), return_exceptions=True)
    assert [r for r in results if isinstance(r, str)] == ["a"] * 5
    assert sum("being loaded here already" in str(r) for r in results) == 4


async def test_one_whose_files_are_gone_is_not_announced_until_it_is_loaded_again() -> None:
    worker = Worker()
    await worker.load("x", "/aa", 1)
    await worker.load("y", "/bb", 2)
    assert worker.core.adapters is not None
    worker.core.adapters.lost["a"] = "gone"
    await worker.look("a")
    assert worker.names() == {"y": "b"}
    announced = worker.announced
    await worker.look("a")
    assert worker.announced == announced
    del worker.layers.files["/aa"]
    await refused(worker.load("x", "/aa", 1, "a"), Code.INVALID_ARGUMENT, "has no adapter_config.json")
    worker.layers.files["/aa"] = "a"
    assert await worker.load("x", "/aa", 1, "a") == "a"
    assert worker.names() == {"y": "b", "x": "a"}
    assert worker.core.adapters.lost == {}
    await worker.look()


async def test_two_names_of_one_adapter_and_back_again() -> None:
    worker = Worker()
    await worker.load("x", "/aa", 1)
    await worker.load("y", "/aa", 2)
    await worker.unload("x", 3)
    assert worker.kept() == set(), "the other name has it"
    await worker.load("y", "/bb", 4)
    assert worker.kept() == {"a"}
    await worker.load("y", "/aa", 5)
    assert worker.kept() == {"b"}
    worker.now += 2 * KEPT_S
    await worker.look()
    assert worker.layers.has == {"a"}


async def test_what_an_answer_had_until_a_moment_ago_is_kept_for_all_the_time() -> None:
    worker = Worker()
    await worker.load("x", "/aa", 1)
    worker.start(1, "a")
    await worker.unload("x", 2)
    worker.now += KEPT_S - 1
    await worker.look()
    while not worker.core.is_idle():
        worker.step()
    worker.now += KEPT_S - 1
    await worker.look()
    assert worker.kept() == {"a"}, "the last look saw it used, less than a minute ago"
    worker.now += 1
    await worker.look()
    assert worker.kept() == set()


async def test_a_worker_without_the_adapter_sends_requests_elsewhere_and_does_not_judge_them() -> None:
    worker = Worker({"x": "a"})
    worker.start(1, "b")
    assert worker.core.adapters is not None
    worker.core.adapters.lost["a"] = "gone"
    worker.start(2, "a")
    outbox = worker.core.take_outbox()
    assert outbox is not None
    assert [end.code for end in outbox.links[1].ends] == [Code.UNAVAILABLE] * 2


async def test_a_load_that_nobody_waits_for_leaves_nothing() -> None:
    worker = Worker()
    at_engine, go_on = asyncio.Event(), asyncio.Event()

    async def slow(question: Callable[[WorkerCore], bool]) -> bool:
        question(worker.core)
        at_engine.set()
        await go_on.wait()
        return True

    worker.live = LiveAdapters(AdaptersConfig(max_rank=8), worker.layers, slow, lambda: worker.now)  # type: ignore[arg-type]
    loading = asyncio.create_task(worker.load("x", "/aa", 1))
    await at_engine.wait()
    loading.cancel()
    await asyncio.wait([loading])
    go_on.set()
    assert worker.names() == {}
    worker.now += KEPT_S
    await worker.look()
    assert worker.layers.has == set()


async def test_the_first_to_read_one_stops_when_the_router_has_given_up_and_others_go_on() -> None:
    """The command was refused, or another worker is asked: nothing may come of it any more."""
    worker = Worker()
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def slow(word: AdapterWord) -> Any:
        reading.set()
        await go_on.wait()
        return worker.layers.read(word.name, word.directory)

    worker.live = LiveAdapters(AdaptersConfig(max_rank=8), worker.layers, worker._on_engine, lambda: 0.0, slow)  # type: ignore[arg-type]
    servicer = WorkerServicer("d", 1, lambda _: None, lambda *_: None, adapters=worker.live)
    for name, digest in (("first", ""), ("told", "b")):
        request = worker_pb2.SetAdapterRequest(
            adapter=worker_pb2.Adapter(name=name, digest=digest, directory="/bb", stamp=1)
        )
        call = asyncio.create_task(servicer.SetAdapter(request, SimpleNamespace()))  # type: ignore[arg-type]
        await reading.wait()
        reading.clear()
        call.cancel()
        await asyncio.wait([call])
        await asyncio.sleep(0)
    go_on.set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert worker.names() == {"told": "b"}
