"""A real cluster under Ray Serve follows its load, and loses nothing (tests/support/scaled.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def scaled(directory: Path, model: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.scaled", "--directory", str(directory), "--model", str(model)]
    with (directory / "out").open("w") as out:
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=940, check=False
        )
    said = (directory / "out").read_text()
    assert done.returncode == 0, said[-12000:]
    found = json.loads((directory / "found.json").read_text())
    print(json.dumps(found))
    return found


@pytest.mark.long
@pytest.mark.timeout(960)
def test_each_pool_follows_its_own_load_and_no_answer_is_lost(tmp_path: Path, small_model: Path) -> None:
    found = scaled(tmp_path, small_model)
    assert found["complete"] > 100
    assert found["migrated_when_the_decode_pool_shrank"]
    assert found["most_workers"] == 4


@pytest.mark.long
@pytest.mark.timeout(960)
def test_a_worker_that_finds_no_place_is_withdrawn_and_comes_when_there_is_one(
    tmp_path: Path, small_model: Path
) -> None:
    found = scaled(tmp_path, small_model, "--few-places")
    assert found["without_a_place"] > 20
    assert found["rules"]["withdrawn"] >= 1
