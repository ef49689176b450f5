"""A cluster under Ray over several hosts follows its load while one of them is cut off and healed: a Ray node in each
network namespace, KV over TCP between them (tests/support/scaled.py, ray_nodes.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.netns import Hosts, unavailable
from tests.support.ray_nodes import HOSTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.timeout(960)
def test_a_host_is_cut_off_and_healed_while_the_pools_follow_the_load(tmp_path: Path, small_model: Path) -> None:
    if "DIPTYCH_TEST_HOSTS" not in os.environ:
        pytest.skip("takes a quiet machine for a quarter of an hour: make test-hosts")
    if reason := unavailable():
        pytest.skip(reason)
    hosts = Hosts(HOSTS)
    command = [sys.executable, "-m", "tests.support.scaled", "--directory", str(tmp_path), "--model", str(small_model)]
    try:
        with (tmp_path / "out").open("w") as out:
            done = subprocess.run(
                ["ip", "netns", "exec", hosts.hub, *command, "--hosts", str(os.getpid())],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=940,
                check=False,
            )
    finally:
        hosts.close()
    said = (tmp_path / "out").read_text()
    assert done.returncode == 0, said[-12000:]
    found = json.loads((tmp_path / "found.json").read_text())
    print(json.dumps(found))
    assert found["complete"] > 100
