"""The handoff protocol's model holds, and each rule that is taken out of it is missed (docs/handoff-model)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "docs" / "handoff-model" / "check.py"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_model_holds_and_every_removed_rule_is_missed() -> None:
    if shutil.which("spin") is None:
        pytest.skip("the model checker spin is not installed (apt-get install spin)")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("spin needs a C compiler, and there is none (apt-get install gcc)")
    done = subprocess.run([sys.executable, str(CHECK)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_a_missing_tool_is_named_with_its_remedy() -> None:
    done = subprocess.run(
        [sys.executable, str(CHECK)], env={"PATH": "/nonexistent"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "spin is not on the PATH; install it" in done.stderr
