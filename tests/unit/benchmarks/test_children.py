"""A benchmark that waits for a process learns at once that it ended, with which code, and what it said last."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.children import Child, ChildEnded, ChildSilent, hear, wait_until

LONG_S = 60.0


def python(name: str, code: str, directory: Path, *, talks: bool = False) -> Child:
    return Child(name, [sys.executable, "-S", "-c", code], directory, talks=talks)


def test_an_answer_and_an_end_instead_of_one(tmp_path: Path) -> None:
    code = "import sys; print(input()); print('no memory', file=sys.stderr); sys.exit(7)"
    child = python("engine", code, tmp_path, talks=True)
    child.ask("hello")
    assert child.answer(LONG_S) == "hello"
    begun = time.monotonic()
    with pytest.raises(ChildEnded, match=r"(?s)engine ended with exit code 7; .*engine\.log.*no memory"):
        child.answer(LONG_S)
    with pytest.raises(ChildEnded, match="exit code 7"):
        child.ask("still there?")
    assert time.monotonic() - begun < LONG_S / 2
    assert child.failed
    child.stop()


def test_a_killed_one_is_named_with_its_signal(tmp_path: Path) -> None:
    child = python("worker", "import os; os.kill(os.getpid(), 9)", tmp_path)
    with pytest.raises(ChildEnded, match="worker ended by SIGKILL"):
        wait_until(lambda: False, LONG_S, "a worker", child)
    child.stop()


def test_one_that_ended_is_not_silent_because_what_it_started_lives(tmp_path: Path) -> None:
    code = "import os, time; os.fork() or time.sleep(600); os._exit(3)"  # the fork holds the pipe
    child = Child("engine", [sys.executable, "-S", "-c", code], tmp_path, talks=True, own_session=True)
    with pytest.raises(ChildEnded, match="engine ended with exit code 3"):
        child.answer(LONG_S)
    child.stop()


def test_a_silent_one_is_not_called_ended(tmp_path: Path) -> None:
    child = python("engine", "import sys; print('loading', file=sys.stderr, flush=True); input()", tmp_path, talks=True)
    wait_until(lambda: "loading" in child.log.read_text(), LONG_S, "its first words", child)
    with pytest.raises(ChildSilent, match=r"(?s)no answer within 0 s; .*loading"):
        child.answer(0.0)
    with pytest.raises(ChildSilent, match=r"(?s)not within 0 s: a model\nengine: .*loading"):
        wait_until(lambda: False, 0.0, "a model", child)
    child.stop()


def test_whoever_is_waited_for_beside_another_one_may_be_who_ended(tmp_path: Path) -> None:
    alive = python("router", "import time; time.sleep(600)", tmp_path)
    gone = python("worker", "raise ValueError('no such model')", tmp_path)
    with pytest.raises(ChildEnded, match=r"(?s)worker ended with exit code 1.*no such model"):
        wait_until(lambda: False, LONG_S, "a cluster", alive, gone)
    alive.check()
    for child in (alive, gone):
        child.stop()


def test_a_pipe_to_a_process_that_ended() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=os._exit, args=(5,), name="reader")
    process.start()
    with pytest.raises(ChildEnded, match="a rate: the process reader ended with exit code 5"):
        hear(ours, LONG_S, "a rate", process)
    theirs.send(3)
    assert hear(ours, LONG_S, "a rate", process) == 3, "what was sent before is heard"
    with pytest.raises(ChildSilent, match="not within 0 s: a rate"):
        hear(ours, 0.0, "a rate")
