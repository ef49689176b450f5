"""What a log file grows by when somebody can bring a line about at will."""

from __future__ import annotations

import io
import logging

import pytest

from settings.telemetry.repeats import Repeats


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def written() -> tuple[io.StringIO, logging.Logger, Clock]:
    clock, text = Clock(), io.StringIO()
    handler = logging.StreamHandler(text)
    handler.addFilter(Repeats(lines=5, every_s=10.0, clock=clock))
    logger = logging.Logger("some.library")
    logger.addHandler(handler)
    return text, logger, clock


def test_a_flood_of_one_kind_is_counted(written: tuple[io.StringIO, logging.Logger, Clock]) -> None:
    text, logger, clock = written
    for second in range(30):
        clock.now = float(second)
        for number in range(1000):
            try:
                raise IndexError(number)
            except IndexError:
                logger.exception("Unexpected [%s] raised", number)
    assert len(text.getvalue()) < 20_000
    assert text.getvalue().count("Traceback") == 15
    assert "(and 9995 like it in 10 s)" in text.getvalue()


def test_other_kinds_go_on(written: tuple[io.StringIO, logging.Logger, Clock]) -> None:
    text, logger, _ = written
    for _ in range(100):
        logger.info("the flood")
    logger.info("something else")
    assert text.getvalue().count("the flood") == 5
    assert text.getvalue().endswith("something else\n")


def test_what_a_stranger_sent_is_cut(written: tuple[io.StringIO, logging.Logger, Clock]) -> None:
    text, logger, _ = written
    logger.error("Invalid encoding on %s", b"\xff" * 100_000)
    assert len(text.getvalue()) < 10_000
    logger.error("%(what)s", {"what": "x" * 100_000})
    assert len(text.getvalue()) < 20_000


def test_kinds_without_end_are_forgotten(written: tuple[io.StringIO, logging.Logger, Clock]) -> None:
    _, logger, _ = written
    for number in range(10_000):
        logger.error("kind %d" % number)  # noqa: UP031
    (kept,) = [f for h in logger.handlers for f in h.filters]
    assert isinstance(kept, Repeats)
    assert len(kept._seen) <= 4096
