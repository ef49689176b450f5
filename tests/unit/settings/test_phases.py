"""Whoever starts says what it is doing; nobody fails because nobody listens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from settings.phases import FILE_VARIABLE, SERVES, UNKNOWN, phase, read_phase, tell_phases_to, waiting_for


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
