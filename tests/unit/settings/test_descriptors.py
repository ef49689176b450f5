"""Connections have bounds that leave file descriptors for everything else."""

from __future__ import annotations

import pytest

from settings.descriptors import shared_out

WANTED = {"http": 8192, "public": 4096, "internal": 4096}


def test_where_there_is_room_everybody_gets_what_is_wanted() -> None:
    assert shared_out(WANTED, 1 << 20) == WANTED


@pytest.mark.parametrize("limit", [128, 256, 1024, 4096, 16_000])
def test_where_there_is_not_a_reserve_is_left(limit: int) -> None:
    given = shared_out(WANTED, limit)
    assert sum(given.values()) <= max(limit - 96, 12)
    assert given["http"] >= given["public"] == given["internal"] >= 4


def test_a_port_that_is_off_gets_nothing() -> None:
    assert shared_out({"http": 0, "public": 4096}, 1024)["http"] == 0
