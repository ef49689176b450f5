"""The native kernels at every level that they have: each runs where the processor can, and says so where it cannot."""

from __future__ import annotations

import pytest

from engine.native.build import LEVELS, runs_here
from engine.native.library import Library, load_library


def missing(isa: str) -> str:
    return f"this processor has no {isa}"


EVERY_LEVEL = pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.skipif(not runs_here(isa), reason=missing(isa))) for isa in LEVELS]
)


def library(isa: str, threads: int = 2) -> Library:
    """Held to `isa`, and no less."""
    if not runs_here(isa):
        pytest.skip(missing(isa))
    found = load_library(threads, isa=isa)
    assert found.isa == isa, "compiled for other instructions than it was asked for"
    return found
