"""A real cluster under Ray Serve follows its load, and loses nothing (tests/support/scaled.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.timeout(960)
def test_each_pool_follows_its_own_load_and_no_answer_is_lost(tmp_path: Path, small_model: Path) -> None:
    command = [sys.executable, "-m", "tests.support.scaled", "--directory", str(tmp_path), "--model", str(small_model)]
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=940, check=False)
    said = (tmp_path / "out").read_text()
    assert done.returncode == 0, said[-12000:]
    found = json.loads((tmp_path / "found.json").read_text())
    print(json.dumps(found))
    assert found["complete"] > 100
    assert found["migrated_when_the_decode_pool_shrank"]
    assert found["most_workers"] == 4
