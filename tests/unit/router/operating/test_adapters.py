"""Commands about adapters: every worker has what names stand for, those that come later, and at every router."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from router.errors import Code, Failure, RequestRefused
from router.operating.adapters import AdapterOperator
from router.placement.adapter_words import AdaptersSaid, AdapterWord
from router.placement.adapters import Adapters
from router.placement.cluster import Cluster, Role, WorkerInfo
from router.placement.view import WorkerKey

DISGUISED = {"/a": "a" * 32, "/b": "b" * 32}


class Machine:
    """A worker's side: what it has, and which directories it finds."""

    def __init__(self, name: str, role: Role, *, takes_more: bool = True, group: str = "", **first: str) -> None:
        self.info = WorkerInfo(WorkerKey(name, 1), role, "host:1", "m", "kv", 32, 64, 100, 8192, 1000, group=group)
        self.said = AdaptersSaid(
            tuple(AdapterWord(n, d, f"/start/{n}") for n, d in first.items()), takes_more=takes_more
        )
        self.files = dict(DISGUISED)
        self.told: list[AdapterWord] = []

    @property
    def names(self) -> dict[str, str]:
        return {word.name: word.digest for word in self.said.adapters}

    def set(self, word: AdapterWord) -> tuple[str, Failure | None]:
        self.told.append(word)
        if word.stamp < self.said.stamp_of(word.name):
            return "", Failure(Code.FAILED_PRECONDITION, "a later command")
        others = tuple(one for one in self.said.adapters if one.name != word.name)
        gone = tuple(one for one in self.said.gone if one[0] != word.name)
        if not word.directory:
            self.said = replace(
                self.said, adapters=others, gone=(*gone, (word.name, word.stamp)), changes=self.said.changes + 1
            )
            return "", None
        digest = self.files.get(word.directory, "")
        if not digest or (word.digest and word.digest != digest):
            return "", Failure(Code.INVALID_ARGUMENT, f"{word.directory} has other files, or none")
        found = replace(word, digest=digest)
        self.said = replace(self.said, adapters=(*others, found), gone=gone, changes=self.said.changes + 1)
        return digest, None


class Router:
    def __init__(self, *machines: Machine, wall: int = 1000) -> None:
        self.cluster = Cluster()
        self.adapters = Adapters(self.cluster, ("m",))
        self.machines: dict[WorkerKey, Machine] = {}
        self.now, self.wall = 0.0, wall
        self.operator = AdapterOperator(self.cluster, self.adapters, self._tell, lambda: self.now, self._wall)
        self.hold: asyncio.Event | None = None
        for machine in machines:
            self.join(machine)

    def _wall(self) -> int:
        return self.wall

    def join(self, machine: Machine) -> None:
        self.machines[machine.info.key] = machine
        self.beat(machine)
        self.cluster.connected(machine.info.key, self.now)

    def beat(self, machine: Machine) -> None:
        self.cluster.registered(replace(machine.info, adapters=machine.said), self.now, leaving=False)

    async def _tell(self, key: WorkerKey, word: AdapterWord, timeout_s: float) -> tuple[str, Failure | None]:
        assert timeout_s > 0
        if self.hold is not None:
            await self.hold.wait()
        done = self.machines[key].set(word)
        self.cluster.said_adapters(key, self.machines[key].said)
        return done

    async def settle(self) -> None:
        self.now += 100.0
        self.operator.look()
        for _ in range(20):
            await asyncio.sleep(0)


async def refused(doing: Any, code: Code, why: str) -> None:
    with pytest.raises(RequestRefused, match=why) as raised:
        await doing
    assert raised.value.failure.code is code


A, B = DISGUISED.values()


async def test_load_replace_and_unload() -> None:
    p, d, standby = Machine("p", Role.PREFILL), Machine("d", Role.DECODE), Machine("s", Role.STANDBY)
    router = Router(p, d, standby)
    served, replaced = await router.operator.load("sql", "/a")
    assert (served.word.digest, served.decode, served.prefill, replaced) == (A, True, True, "")
    assert all(m.names == {"sql": A} for m in (p, d, standby))
    assert router.adapters.digests() == {"sql": A}
    served, replaced = await router.operator.load("sql", "/b")
    assert (served.word.digest, replaced) == (B, A)
    assert router.adapters.digests() == {"sql": B}
    assert await router.operator.unload("sql") == (B, ())
    assert router.adapters.digests() == {}
    assert all(m.names == {} for m in (p, d, standby))
    await refused(router.operator.unload("sql"), Code.NOT_FOUND, "there are: none")
    assert router.operator.listed() == []


async def test_a_worker_that_cannot_is_named_and_told_again() -> None:
    p, d = Machine("p", Role.PREFILL), Machine("d", Role.DECODE)
    old = Machine("old", Role.DECODE, takes_more=False)
    del p.files["/a"]
    router = Router(p, d, old)
    served, _ = await router.operator.load("sql", "/a")
    assert (served.decode, served.prefill) == (True, False)
    errors = {w.worker_id: w.error for w in served.workers}
    assert errors["d"] == ""
    assert "other files, or none" in errors["p"]
    assert "set engine.adapters.max_rank" in errors["old"]
    assert {key.worker_id for key in router.adapters.lacking(A)} == {"p", "old"}
    router.operator.look()
    await asyncio.sleep(0)
    assert len(p.told) == 1, "not at once"
    p.files["/a"] = A
    await router.settle()
    assert p.names == {"sql": A}
    assert [w.error for s in router.operator.listed() for w in s.workers if w.worker_id == "p"] == [""]
    assert old.told == []


async def test_weights_that_differ_between_machines_are_never_served_under_one_name() -> None:
    d, d2 = Machine("d", Role.DECODE), Machine("d2", Role.DECODE)
    d2.files["/a"] = B
    router = Router(d, d2)
    served, _ = await router.operator.load("sql", "/a")
    assert {w.worker_id: w.has for w in served.workers} == {"d": True, "d2": False}
    assert d2.names == {}


async def test_if_nobody_can_nothing_has_changed() -> None:
    d = Machine("d", Role.DECODE, sql=B)
    router = Router(d, Machine("p", Role.PREFILL))
    before = router.adapters.digests()
    await refused(
        router.operator.load("sql", "/nowhere"), Code.INVALID_ARGUMENT, "no decode worker could load it: d: /nowhere"
    )
    assert router.adapters.digests() == before == {"sql": B}
    assert router.adapters.words() == {}
    for name, directory, code, why in (
        ("m", "/a", Code.ALREADY_EXISTS, "a name of the model itself"),
        ("", "/a", Code.INVALID_ARGUMENT, "1 to 256 printable characters"),
        ("a\nb", "/a", Code.INVALID_ARGUMENT, "1 to 256 printable characters"),
        ("x" * 257, "/a", Code.INVALID_ARGUMENT, "1 to 256 printable characters"),
        ("x", "a", Code.INVALID_ARGUMENT, "is no absolute path"),
        ("x", "/a\0", Code.INVALID_ARGUMENT, "is no absolute path"),
    ):
        await refused(router.operator.load(name, directory), code, why)
    await refused(router.operator.load("x", "/a", ("gpu",)), Code.FAILED_PRECONDITION, "no ready decode worker of gpu")
    await refused(router.operator.load("x", "/a", (), 1e9), Code.INVALID_ARGUMENT, "use 0.1 to 600")
    await refused(Router().operator.load("x", "/a"), Code.FAILED_PRECONDITION, "no ready decode worker has room")


async def test_who_comes_later_gets_what_is_served_and_loses_what_is_not() -> None:
    router = Router(Machine("d", Role.DECODE, sql=A, poet=A))
    await router.operator.load("sql", "/b")
    await router.operator.unload("poet")
    late = Machine("late", Role.PREFILL, sql=A, poet=A)
    router.join(late)
    assert router.adapters.digests() == {"sql": B}, "its settings do not bring back what was unloaded"
    await router.settle()
    assert late.names == {"sql": B}
    told = len(late.told)
    await router.settle()
    assert len(late.told) == told


async def test_only_workers_of_the_groups_that_are_named() -> None:
    one, other = Machine("d1", Role.DECODE, group="gpu"), Machine("d2", Role.DECODE, group="cpu")
    router = Router(one, other)
    await router.operator.load("sql", "/a", ("gpu",))
    await router.settle()
    assert (one.names, other.names) == ({"sql": A}, {})
    late = Machine("d3", Role.DECODE, group="gpu")
    router.join(late)
    await router.settle()
    assert late.names == {"sql": A}


async def test_routers_tell_one_another_through_workers() -> None:
    """The second one was not asked; its clock is behind, and its command is the later one all the same."""
    machines = Machine("p", Role.PREFILL), Machine("d", Role.DECODE)
    first, second = Router(*machines, wall=5000), Router(*machines, wall=10)
    await first.operator.load("sql", "/a")
    for machine in machines:
        second.beat(machine)
    assert second.adapters.digests() == {"sql": A}
    await second.operator.unload("sql")
    for machine in machines:
        first.beat(machine)
    assert first.adapters.digests() == {}
    third = Router(*machines)
    assert third.adapters.digests() == {}
    late = Machine("late", Role.DECODE, sql=A)
    third.join(late)
    await third.settle()
    assert late.names == {}, "workers remember what was unloaded, for routers that come later"


async def test_one_command_a_name_at_a_time_and_few_in_all() -> None:
    router = Router(Machine("d", Role.DECODE))
    router.hold = asyncio.Event()
    running = [asyncio.create_task(router.operator.load(f"n{i}", "/a")) for i in range(4)]
    await asyncio.sleep(0)
    await refused(router.operator.load("n0", "/b"), Code.FAILED_PRECONDITION, "is under way")
    await refused(router.operator.load("n9", "/b"), Code.RESOURCE_EXHAUSTED, "4 adapters are being loaded")
    router.hold.set()
    await asyncio.gather(*running)
    await router.operator.load("n0", "/b")
    assert router.adapters.digests() == {"n0": B, "n1": A, "n2": A, "n3": A}


async def test_an_older_word_never_comes_back() -> None:
    """A heartbeat that was on its way while a command was carried out says what was before it."""
    d = Machine("d", Role.DECODE)
    router = Router(d)
    before = d.said
    await router.operator.load("sql", "/a")
    router.cluster.registered(replace(d.info, adapters=before), 1.0, leaving=False)
    assert router.adapters.digests() == {"sql": A}


async def test_one_that_hangs_costs_its_share_of_the_time_and_is_asked_last_from_then_on() -> None:
    router = Router(*(Machine(f"d{i}", Role.DECODE) for i in range(4)))
    tell, shares = router.operator._tell, []  # pyright: ignore[reportPrivateUsage]

    async def hangs(key: WorkerKey, word: AdapterWord, timeout_s: float) -> tuple[str, Failure | None]:
        if key.worker_id != "d0":
            return await tell(key, word, timeout_s)
        if not word.digest:
            shares.append(timeout_s)
            router.now += timeout_s
        return "", Failure(Code.DEADLINE_EXCEEDED, "it hangs")

    router.operator._tell = hangs  # pyright: ignore[reportPrivateUsage]
    served, _ = await router.operator.load("sql", "/a", timeout_s=60.0)
    assert shares == [20.0]
    assert served.word.stamp == 1001, "a late end of the first try is older"
    assert [w.has for w in served.workers] == [False, True, True, True]
    await router.operator.load("poet", "/a")
    assert shares == [20.0]


async def test_a_worker_that_cannot_be_told_has_failed_and_nothing_ends() -> None:
    d, d2 = Machine("d", Role.DECODE), Machine("d2", Role.DECODE)
    router = Router(d, d2)
    tell = router.operator._tell  # pyright: ignore[reportPrivateUsage]

    async def breaks(key: WorkerKey, word: AdapterWord, timeout_s: float) -> tuple[str, Failure | None]:
        if key.worker_id == "d2" or word.directory == "/b":
            raise ValueError("out of range")
        return await tell(key, word, timeout_s)

    router.operator._tell = breaks  # pyright: ignore[reportPrivateUsage]
    served, _ = await router.operator.load("sql", "/a")
    assert {w.worker_id: "out of range" in w.error for w in served.workers} == {"d": False, "d2": True}
    await refused(router.operator.load("sql", "/b"), Code.INTERNAL, "out of range")
    router.operator._tell = tell  # pyright: ignore[reportPrivateUsage]
    await router.settle()
    assert d2.names == {"sql": A}


async def test_nothing_is_looked_through_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    d = Machine("d", Role.DECODE)
    router = Router(d)
    await router.operator.load("sql", "/a")
    await router.settle()
    looked: list[str] = []
    of_old = AdaptersSaid.stamp_of
    monkeypatch.setattr(AdaptersSaid, "stamp_of", lambda said, name: (looked.append(name), of_old(said, name))[1])
    for _ in range(8):
        router.operator.look()
    assert looked == []
    router.join(Machine("late", Role.STANDBY))
    router.operator.look()
    assert looked == ["sql", "sql"]


async def test_only_what_a_worker_says_anew_is_heard_again(monkeypatch: pytest.MonkeyPatch) -> None:
    d, d2 = Machine("d", Role.DECODE), Machine("d2", Role.DECODE)
    d2.said = AdaptersSaid(gone=tuple((f"n{i}", i + 1) for i in range(1024)), changes=1)
    router = Router(d, d2)
    assert len(router.adapters.words()) == 1024
    assert d2.said.stamp_of("n7") == 8
    assert d2.said.stamp_of("none") == -1
    heard: list[str] = []
    hear = Adapters._hear  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(Adapters, "_hear", lambda one, word: (heard.append(word.name), hear(one, word))[1])
    d.set(AdapterWord("sql", A, "/a", 5000))
    router.beat(d)
    assert router.adapters.digests() == {"sql": A}
    assert heard == ["sql"]
