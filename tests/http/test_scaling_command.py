"""`diptych scaling` against a real router on real sockets, with a worker that has measured nothing."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from deploy.cli import app
from tests.support.in_process_router import InProcessRouter


def test_it_says_what_the_policy_would_do(running: InProcessRouter, tmp_path: Path) -> None:
    settings = tmp_path / "cluster.yaml"
    settings.write_text(yaml.safe_dump({"scaling": {"budget_gpus": 3, "dry_run": True, "interval_s": 0.05}}))
    target = f"127.0.0.1:{running.router.port}"
    command = ["scaling", "--config", str(settings), "--target", target, "--looks", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    # There is a decode worker and no prefill worker: what the smallest pools are comes first.
    lines = [line for line in done.output.splitlines() if " prefill, " in line]
    assert lines[0].startswith("1 prefill, 1 decode (limits)")
    assert "GPUs held" in done.output
    done = CliRunner().invoke(app, [*command, "--json"])
    decisions = [json.loads(part) for part in done.output.replace("}\n{", "}\x00{").split("\x00")]
    assert [d["dry_run"] for d in decisions] == [True, True]
    assert decisions[0]["numbers"]["budget_gpus"] == 3


def test_without_a_budget_it_says_what_to_set() -> None:
    done = CliRunner().invoke(app, ["scaling"])
    assert done.exit_code == 1
    assert "set scaling.budget_gpus" in done.output
