"""A test's report reaches the process that collects them, whatever its test logged (tests/support/tiers.py)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.tiers import encodable, pytest_runtest_makereport


class Item:
    stash = pytest.Stash()


class Call:
    when = "call"


class Report:
    def __init__(self) -> None:
        self.sections = [("Captured log call", "not \ud800 for the wire"), ("Captured stdout call", "naïve 東京")]
        self.failed = True
        self.longrepr: Any = "AssertionError: \udfff"
        self.processor_s = -1.0


def test_a_report_with_half_a_surrogate_is_encodable() -> None:
    item: Any = Item()
    call: Any = Call()
    hook = pytest_runtest_makereport(item, call)
    next(hook)
    with pytest.raises(StopIteration) as done:
        hook.send(Report())
    report = done.value.value
    assert report.sections == [
        ("Captured log call", "not \\ud800 for the wire"),
        ("Captured stdout call", "naïve 東京"),
    ]
    assert report.longrepr == "AssertionError: \\udfff"
    assert encodable("plain") == "plain"
