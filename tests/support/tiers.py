"""How the tests run side by side, and what is asked of every one of them. A pytest plugin; tests/conftest.py loads it.

`make test` runs three processes on two processors, since much of what the tests do is to wait for processes of theirs.
Tests that share something costly, such as a cluster of real processes, stay together in one of them (TOGETHER), one
after the other; what they share ends with the last of them. Groups that wait and groups that compute take turns. A test
that leaves a process of its own running fails, and so does one whose cluster takes the default ports. With --unit-limit
a test in tests/unit that computes for longer fails. The summary says what each folder cost.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.config import ClusterTelemetryConfig
from router.config import RouterConfig

_CLUSTER_FILES = ("client", "edges", "exact", "openai_sdk", "prompt_logprobs", "resumed", "structured")
RAY = "one Ray after the other"
# Tests by the beginning of their names, the longest that fits; every other file is a group of its own.
TOGETHER = {
    "the shared cluster": ("clients/", "ui/", *(f"cluster/test_{name}.py" for name in _CLUSTER_FILES)),
    "a router that restarts": ("cluster/test_router_restart.py", "cluster/test_client.py::test_a_killed_router"),
    "a decode worker alone": ("cluster/test_watchdog.py", "cluster/test_pools.py::test_without_a_prefill_pool"),
    "the secured cluster": ("security/",),
    # Ray gives up starting on processors that are busy with another one.
    RAY: (
        "chaos/test_ray.py",
        "cluster/test_commands.py::test_a_cluster_that_starts_is_stopped_at_once[True",
        "cluster/test_commands.py::test_under_ray",
        "cluster/test_commands.py::test_up_generate_status_bench_and_a_clean_stop[True",
        "cluster/test_pod_end.py",
        "cluster/test_ranks_under_ray.py",
        "cluster/test_scaled.py",
        "security/test_ray.py",
    ),
    "a router over HTTP": ("http/",),
    "a router under fuzz": ("fuzz/",),
}
# Files whose tests share nothing, and each take long: every one is a group of its own, so that none of them is last.
APART = (
    "artefacts/test_benchmarks.py", "artefacts/test_gpu_check.py", "cluster/test_commands.py",
    "model/test_bfloat16_families.py", "model/test_survey.py", "scenarios/test_scenarios.py",
)  # fmt: skip
# Where tests start processes, and wait for them much of the time. The others compute.
WAITING = ("artefacts/", "chaos/", "clients/", "cluster/", "security/", "ui/")
# Session fixtures that everybody may have: they are cheap, or no process is theirs.
_CHEAP = {"model_path", "small_model", "tokenizer", "secured", "tmp_path_factory", "record_testsuite_property"}
# They live as long as the test process.
_SERVANTS = (
    b"tests.support.zygote\0",
    b"multiprocessing.resource_tracker",
    b"multiprocessing.forkserver",
    b"playwright",
)
_LEAVING_S = 5.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--unit-limit", type=float, metavar="SECONDS", help="processor time of a test in tests/unit")


def tiered(quick: Iterable[Any], more: Iterable[Any]) -> list[Any]:
    """Parameters of a test: the first for `make test`, the others for `make test-long` alone."""
    rest = (value if isinstance(value, tuple) else (value,) for value in more)
    return [*quick, *(pytest.param(*values, marks=pytest.mark.long) for values in rest)]


def group_of(nodeid: str) -> str:
    """Those of one group run in one process, one after the other."""
    name = nodeid.removeprefix("tests/")
    fits = [
        (len(prefix), group) for group, prefixes in TOGETHER.items() for prefix in prefixes if name.startswith(prefix)
    ]
    fits += [(len(prefix), name) for prefix in APART if name.startswith(prefix)]
    return max(fits)[1] if fits else name.split("::")[0]


def in_turns(tests: Iterable[str]) -> list[str]:
    """The groups of these tests, those that wait spread evenly among those that compute: else all would wait first, and
    processors would have nothing to do. They begin within the first two thirds, and unit tests, the shortest, are last,
    so that all processes end together.
    """
    kinds: dict[str, int] = {}
    for nodeid in tests:
        name = nodeid.removeprefix("tests/")
        kinds.setdefault(group_of(nodeid), 2 if name.startswith("unit/") else int(not name.startswith(WAITING)))
    by_kind = [[group for group, its in kinds.items() if its == kind] for kind in range(3)]
    spread = [
        (share * (place + 0.5) / len(some), group)
        for share, some in zip((2 / 3, 1), by_kind, strict=False)
        for place, group in enumerate(some)
    ]
    return [*(group for _, group in sorted(spread)), *by_kind[2]]


def pytest_configure(config: pytest.Config) -> None:
    """The default ports are taken while tests run. A test that uses one would fail only on the day that it meets
    another such test, or beside a cluster that somebody runs; so it fails always.
    """
    if hasattr(config, "workerinput"):  # of xdist, whose own process has them
        return
    for port in default_ports():
        taken = socket.socket()
        config.add_cleanup(taken.close)
        with contextlib.suppress(OSError):  # somebody else has it: as good
            # It does not listen: who connects is refused. All addresses include this one; a pod has its own.
            taken.bind(("127.0.0.1", port))


def default_ports() -> list[int]:
    configs = (RouterConfig(), ClusterTelemetryConfig())
    return [value for config in configs for name, value in config if name.endswith("_port") and value]


@pytest.hookimpl(tryfirst=True)  # before marks choose
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuses a costly fixture that two groups would each make for themselves. Groups are not interrupted."""
    groups: dict[tuple[str, str], set[str]] = {}
    for item in items:
        for fixture in costly(item):
            groups.setdefault(fixture, set()).add(group_of(item.nodeid))
    apart = {fixture: sorted(names) for fixture, names in groups.items() if len(names) > 1}
    if apart:
        raise pytest.UsageError(f"add to TOGETHER in tests/support/tiers.py those that share a fixture: {apart}")
    for item in items:
        if group_of(item.nodeid) == RAY:
            item.add_marker("ray")
    names = [item.nodeid for item in items]
    side_by_side = hasattr(config, "workerinput")  # of xdist
    order = in_turns(names) if side_by_side else dict.fromkeys(map(group_of, names))
    places = {group: place for place, group in enumerate(order)}
    items.sort(key=lambda item: places[group_of(item.nodeid)])


def costly(item: pytest.Item) -> dict[tuple[str, str], Any]:
    """Fixtures of ours that live for the session, by where they are from and their names."""
    last = (fixtures[-1] for fixtures in item._fixtureinfo.name2fixturedefs.values())  # type: ignore[attr-defined]
    ours = (f for f in last if f.scope == "session" and f.baseid.startswith("tests") and f.argname not in _CHEAP)
    return {(f.baseid, f.argname): f for f in ours}


_shared: dict[tuple[str, str], Any] = {}  # that this process may have made for the group it is at


def end_what_is_shared(item: pytest.Item) -> None:
    """With the last test of its group rather than with the session: processes that wait cost the others time."""
    while _shared:
        _, fixture = _shared.popitem()
        fixture.finish(item._request)  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's own groups go by a suffix of node ids, which newer versions of pytest do not let it set."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

        def _reschedule(self, node: Any) -> None:
            """A process gets its next group when it needs it, and not before: what is long would wait behind what is
            long while another process has nothing to do. It needs a second test to begin the first.
            """
            if node.shutting_down or node not in self.registered_collections:
                return
            while self.workqueue and self._pending_of(self.assigned_work[node]) < 2:
                self._assign_work_unit(node)
            if not self.workqueue:
                node.shutdown()  # when it has run what it has

        def remove_node(self, node: Any) -> str | None:
            """A process that ended amid a test has failed it; others run what it had left. xdist would hand out what is
            complete as well, and wait for ever for news of it.
            """
            groups = self.assigned_work.pop(node)
            crashed = next((test for tests in groups.values() for test, done in tests.items() if not done), None)
            for tests in groups.values():
                tests.update({crashed: True} if crashed in tests else {})
            self.workqueue.update({group: tests for group, tests in groups.items() if not all(tests.values())})
            for other in self.assigned_work:
                self._reschedule(other)
            return crashed

    return Groups(config, log) if config.getvalue("dist") == "loadscope" else None


# No test leaves a process.


def children() -> set[int]:
    """Processes that this one started and that have not been waited for."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update(map(int, (task / "children").read_text().split()))
        except OSError:  # the thread has ended, or this is no Linux
            continue
    return found


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" and not any(s in Path(f"/proc/{pid}/cmdline").read_bytes() for s in _SERVANTS)
    except OSError:
        return False


def still_running(before: set[int], within_s: float) -> list[str]:
    """Command lines of children that were not there before and do not end in time."""
    deadline = time.monotonic() + within_s
    while left := [pid for pid in children() - before if running(pid)]:
        if time.monotonic() > deadline:
            lines = []
            for pid in left:
                try:
                    lines.append(f"{pid}: " + Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
                except OSError:
                    continue
            return lines
        time.sleep(0.02)
    return []


@pytest.fixture(autouse=True)
def no_process_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set up after what lives longer than one test, and before what belongs to it."""
    before = children() if Path("/proc/self/task").exists() else None
    yield
    if before is not None:
        left = still_running(before | _restarted(request.node), _LEAVING_S)
        assert not left, f"the test left processes running; end them and wait for them: {left}"


def _restarted(item: pytest.Item) -> set[int]:
    """Those of clusters that live longer than the test: it may have started one of them again."""
    clusters = getattr(item, "funcargs", {}).values()
    running = [getattr(getattr(cluster, "processes", None), "running", {}) for cluster in clusters]
    return {process.pid for processes in running for process in processes.values()}


# What tests cost.

_COST = pytest.StashKey[dict[str, float]]()


def processor_s() -> float:
    """Of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    _shared.update(costly(item))
    with measured(item, "setup"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    with measured(item, "call"):
        result = yield
    limit_s, took_s = item.config.getoption("--unit-limit"), item.stash[_COST]["call"]
    if limit_s and item.nodeid.startswith("tests/unit/") and took_s > limit_s:
        pytest.fail(f"{took_s:.2f} s of processor time; a unit test has {limit_s:g} s: make it smaller or move it")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    with measured(item, "teardown"):
        try:
            return (yield)
        finally:
            if nextitem is None or group_of(nextitem.nodeid) != group_of(item.nodeid):
                end_what_is_shared(item)


@contextlib.contextmanager
def measured(item: pytest.Item, phase: str) -> Iterator[None]:
    begun = processor_s()
    try:
        yield
    finally:
        item.stash.setdefault(_COST, {})[phase] = processor_s() - begun


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    report.processor_s = item.stash.get(_COST, {}).get(call.when, 0.0)  # which xdist passes on
    # xdist sends reports as UTF-8; one that cannot be sent (a log line with half a surrogate) would end the whole run.
    report.sections = [(name, encodable(text)) for name, text in report.sections]
    if report.failed and encodable(text := str(report.longrepr)) != text:
        report.longrepr = encodable(text)
    return report


def encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Each folder's tests, and what they cost."""
    folders: dict[str, list[float]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if not hasattr(report, "processor_s"):
                continue
            folder = report.nodeid.split("/")[1] if "/" in report.nodeid else report.nodeid
            cost = folders.setdefault(folder, [0, 0.0, 0.0])
            cost[0] += report.when == "call"
            cost[1] += report.duration
            cost[2] += report.processor_s
    if not folders:
        return
    terminalreporter.section("what each folder cost")
    terminalreporter.write_line(f"{'':12}{'tests':>7}{'seconds':>10}{'processor s':>14}")
    for folder, (count, wall_s, used_s) in sorted(folders.items(), key=lambda f: -f[1][1]):
        terminalreporter.write_line(f"{folder:12}{count:7.0f}{wall_s:10.1f}{used_s:14.1f}")
