"""Whoever starts says what it is doing; nobody fails because nobody listens."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from settings.phases import (
    BEFORE,
    FILE_VARIABLE,
    SERVES,
    UNKNOWN,
    Start,
    began,
    phase,
    progress,
    read_phase,
    tell_phases_to,
    waiting_for,
)


@pytest.fixture(autouse=True)
def nobody_listens_afterwards() -> Iterator[None]:
    yield
    tell_phases_to(None)


def test_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "decode-0.phase"
    assert read_phase(file) == UNKNOWN
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    phase("loading the model")
    assert read_phase(file) == "loading the model"
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "gone" / "x"))
    phase("warming up")


def test_by_a_listener() -> None:
    heard: list[str] = []
    tell_phases_to(heard.append)
    phase("warming up")
    tell_phases_to(lambda what: 1 / 0)
    phase(SERVES)
    assert heard == ["warming up"]


def test_those_that_serve_are_not_waited_for() -> None:
    phases = {"router": SERVES, "prefill-0": "compiling the kernels", "decode-0": UNKNOWN}
    assert waiting_for(phases) == "waiting for decode-0 (starting Python), prefill-0 (compiling the kernels)"
    assert waiting_for({"router": SERVES}) == "waiting for the router to reach every worker"
    many = waiting_for({f"decode-{i}": "loading the model" for i in range(64)})
    assert many.endswith(" and 60 more")


def test_where_a_start_spent_its_time() -> None:
    start = Start(100.0)
    start.enter("loading the model", 103.1)
    start.enter("trying the kernels", 109.1)
    start.enter("opening its ports", 109.12)
    start.enter("warming up", 109.13)
    start.enter("trying the kernels", 111.0)
    start.enter(SERVES, 112.0)
    assert start.told() == (
        f"ready after 12.0 s: {BEFORE} 3.1, loading the model 6.0, trying the kernels 1.0, warming up 1.9, the rest 0.0"
    )


def test_a_process_says_it_in_one_line_when_it_serves(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    tell_phases_to(heard.append)
    caplog.set_level(logging.INFO)
    phase("loading the model")
    progress("40 %")
    phase(SERVES)
    progress("100 %")  # of nothing
    assert heard == ["loading the model", "loading the model (40 %)", SERVES]
    *_, last = caplog.messages
    assert last.startswith("start: ready after ")


def test_the_age_of_this_process_is_known() -> None:
    assert 0.0 < time.monotonic() - began() < 24 * 3600
