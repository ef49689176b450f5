"""A start is told while it lasts: where the logs are, what is waited for, how long it took."""

from __future__ import annotations

import io

from rich.console import Console

from deploy.progress import Stages


def told(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


def test_stages_are_told_when_they_begin_and_what_they_wait_for_while_they_last() -> None:
    file, now = io.StringIO(), [0.0]
    stages = Stages(Console(file=file, width=40), clock=lambda: now[0])
    stages.note("logs: /tmp/[a]/logs")
    stages("starting processes")
    assert told(file) == ["logs: /tmp/[a]/logs", "starting processes ..."]
    stages.waiting("waiting for decode-0 (starting Python)")
    assert len(told(file)) == 2  # not yet worth a line
    now[0] = 6.0
    stages.waiting("waiting for decode-0 (loading the model)")
    stages.waiting("waiting for decode-0 (compiling the kernels)")
    now[0] = 30.0
    stages.waiting("waiting for decode-0 (compiling the kernels)")
    now[0] = 40.0
    stages.waiting("waiting for decode-0 (compiling the kernels)")  # nothing new
    stages.done()
    stages.done()
    assert told(file)[2:] == [
        "waiting for decode-0 (loading the model) (6 s)",
        "waiting for decode-0 (compiling the kernels) (30 s)",
        "starting processes (40.0 s)",
    ]


def test_the_end_is_announced_before_it_begins() -> None:
    order: list[str] = []
    stages = Stages(Console(file=io.StringIO()), each=lambda: order.append("each"), at_end=lambda: order.append("end"))
    stages("starting Ray")
    stages.ending("stopping Ray")
    assert order == ["each", "end", "each"]


def test_at_a_terminal_one_line_changes() -> None:
    file = io.StringIO()
    stages = Stages(Console(file=file, force_terminal=True, width=120))
    stages("deploying")
    stages.waiting("waiting for [prefill]")
    stages.done()
    assert "waiting for [prefill]" in file.getvalue()
    assert told(file)[-1].count("deploying (") == 1
