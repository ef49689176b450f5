"""Prefill and decode lose each other while the router still reaches both: real packets, dropped between namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cut_links import CUTS, HOSTS
from tests.support.netns import Hosts, unavailable

LONG = bool(os.environ.get("CHAOS_DURATION"))
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_cut_between_prefill_and_decode(tmp_path: Path, model_path: Path) -> None:
    if reason := unavailable():
        pytest.skip(reason)
    hosts = Hosts(HOSTS)
    command = [sys.executable, "-m", "tests.support.cut_links", "--directory", str(tmp_path)]
    command += ["--model", str(model_path), "--owner", str(os.getpid()), "--cuts", str(len(CUTS) if LONG else 1)]
    try:
        with (tmp_path / "driver.out").open("w") as out:
            done = subprocess.run(
                ["ip", "netns", "exec", hosts.hub, *command],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=360,
                check=False,
            )
    finally:
        hosts.close()
    said = (tmp_path / "driver.out").read_text()
    print(said[-4000:])
    assert done.returncode == 0, said[-12000:]
