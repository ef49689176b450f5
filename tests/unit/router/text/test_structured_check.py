"""The router's check of formats: remembered, beside the event loop, and fair to those who only waited."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from grammar.structured import Kind, Structured
from router.errors import Code, RequestRefused
from router.text import structured as module
from router.text.structured import StructuredChecker

GOOD, BAD = Structured(Kind.REGEX, "a+"), Structured(Kind.REGEX, "[")


def no_tokenizer() -> Any:
    raise AssertionError("only Lark needs one")


async def test_verdicts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = StructuredChecker(no_tokenizer)
    checked: list[Structured] = []
    find = checker._find
    monkeypatch.setattr(checker, "_find", lambda s: (checked.append(s), find(s))[1])
    for _ in range(3):
        await checker.check(GOOD)
        with pytest.raises(RequestRefused, match="unclosed character class"):
            await checker.check(BAD)
    assert checked == [GOOD, BAD]
    checker.close()


async def test_who_waited_for_others_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = StructuredChecker(no_tokenizer)
    release = threading.Event()
    monkeypatch.setattr(checker, "_find", lambda s: release.wait(30.0) and "")
    monkeypatch.setattr(module, "_CHECK_S", 0.05)
    with pytest.raises(RequestRefused, match="takes more than") as slow:
        await checker.check(GOOD)
    with pytest.raises(RequestRefused, match="retry later") as waited:
        await checker.check(BAD)
    assert slow.value.failure.code is Code.INVALID_ARGUMENT
    assert (waited.value.failure.code, waited.value.failure.retry_after_ms) == (Code.RESOURCE_EXHAUSTED, 1000)
    release.set()
    checker.close()


async def test_memory_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = StructuredChecker(no_tokenizer)
    monkeypatch.setattr(module, "_REMEMBERED_BYTES", 10)
    for text in ("aaaa", "bbbb", "cccc"):
        await checker.check(Structured(Kind.REGEX, text))
    assert [s.text for s in checker._verdicts] == ["bbbb", "cccc"]
    checker.close()


async def test_what_takes_too_long_is_paid_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.text.structured._CHECK_S", 0.05)
    asked, go = [], threading.Event()

    def slow(structured: Structured, _: object) -> None:
        asked.append(structured)
        go.wait(10)

    monkeypatch.setattr("router.text.structured.check", slow)
    checker = StructuredChecker(lambda: None)
    bomb = Structured(Kind.REGEX, "(a|b)*")
    try:
        for _ in range(3):
            with pytest.raises(RequestRefused, match="simplify it") as caught:
                await checker.check(bomb)
            assert caught.value.failure.code is Code.INVALID_ARGUMENT
        assert len(asked) == 1
    finally:
        go.set()
        checker.close()
