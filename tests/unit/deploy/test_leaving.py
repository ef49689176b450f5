"""The end of a pod: the hook, and a replica that watches for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy import leaving


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "_LOOK_S", 0.005)


def test_the_hook_waits_until_the_replica_has_drained(tmp_path: Path) -> None:
    draining, may_end = threading.Event(), threading.Event()

    def drain() -> bool:
        draining.set()
        return may_end.wait(5)

    watch = leaving.PodWatch(tmp_path, drain)
    left: list[leaving.Left] = []
    hook = threading.Thread(target=lambda: left.append(leaving.leave(tmp_path, 0, 5)))
    hook.start()
    assert draining.wait(5)
    assert not left, "it waits"
    may_end.set()
    hook.join(5)
    assert left == [leaving.Left(drained=(os.getpid(),), not_drained=(), still_there=())]
    assert left[0].clean
    watch.close()
    assert leaving.leave(tmp_path, 0, 5).clean, "nobody is there any more"


@pytest.mark.parametrize("failing", [False, True])
def test_a_replica_that_has_no_time_or_fails_says_so(tmp_path: Path, failing: bool) -> None:
    def drain() -> bool:
        if failing:
            raise RuntimeError("planted")
        return False

    leaving.PodWatch(tmp_path, drain)
    assert leaving.leave(tmp_path, 0, 5) == leaving.Left((), (os.getpid(),), ())


def test_the_hook_has_a_deadline(tmp_path: Path) -> None:
    over = threading.Event()
    leaving.PodWatch(tmp_path, lambda: over.wait(5))
    left = leaving.leave(tmp_path, 0, 0.05)
    over.set()
    assert left.still_there == (os.getpid(),)
    assert not left.clean


def test_a_replica_that_died_is_not_waited_for(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f"replica-{gone.pid}").write_text("serves")
    assert leaving.leave(tmp_path, 60, 60) == leaving.Left((), (), ())


def test_without_a_pod_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(leaving.DIRECTORY, raising=False)
    assert leaving.watch(lambda: True) is None
