"""What Serve imports can be imported: it would say otherwise only when a cluster starts."""

from __future__ import annotations

import subprocess
import sys

ENTRIES = "deploy.app, deploy.cli, deploy.model_check, elastic_worker.server, worker.main"


def test_every_entry_can_be_imported() -> None:
    command = [sys.executable, "-c", f"import {ENTRIES}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
