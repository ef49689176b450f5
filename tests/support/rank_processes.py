"""Ranks without the seconds in which each imports torch: forked from a process that has (tests/support/zygote.py does
the same for whole workers). `start` stands in for engine.ranks.leader.start_process.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from typing import Any

import pytest

from engine.ranks import leader

_FORKS: Any = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["engine.runner", "tests.support.rank_processes", "transformers.models.auto.modeling_auto"]
)


class _Rank:
    """As much of a subprocess.Popen as the leader looks at."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def start(rank: int, descriptors: list[int]) -> Any:
    process = _FORKS.Process(target=_become, args=(rank, descriptors), daemon=True)
    process.start()
    return _Rank(process)


class _Passed(list[int]):
    """Descriptors that arrive as such."""

    def __reduce__(self) -> Any:
        return _passed, ([reduction.DupFd(fd) for fd in self],)


def _passed(sent: list[Any]) -> list[int]:
    return [fd.detach() for fd in sent]


def _become(rank: int, descriptors: list[int]) -> None:
    from engine.ranks.follower import main

    os._exit(main(*descriptors, 0))


@contextmanager
def quick_ranks() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(leader, "start_process", lambda rank, fds: start(rank, _Passed(fds)))
    try:
        yield
    finally:
        patch.undo()
