"""Which processors the kernels' threads are bound to."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError

from engine.config import EngineConfig
from engine.native.processors import ProcessorsError, chosen


@pytest.fixture(autouse=True)
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 8}, raising=False)


def test_automatic_only_where_every_processor_gets_a_thread() -> None:
    assert chosen("auto", 4) == (2, 3, 5, 8)
    assert chosen("auto", 2) == ()
    assert chosen("auto", 8) == ()
    assert chosen("off", 4) == ()


def test_named_ones() -> None:
    assert chosen("2-3,8", 3) == (2, 3, 8)
    with pytest.raises(ProcessorsError, match="processor 4 is not among those allowed, \\[2, 3, 5, 8\\]"):
        chosen("2-4", 3)
    with pytest.raises(ProcessorsError, match="names 2 processors \\(2-3\\), and 4 threads run"):
        chosen("2-3", 4)


@pytest.mark.parametrize("wrong", ["all", "1-", "-1", "1;2", ""])
def test_what_is_no_list_of_processors_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError, match="pin_threads"):
        EngineConfig(pin_threads=wrong)
