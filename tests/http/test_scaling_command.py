"""`diptych scaling` against a real router on real sockets, with a worker that has measured nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from deploy.cli import app
from deploy.clients import RequestFailed
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


def test_what_is_recorded_is_explained(running: InProcessRouter, tmp_path: Path) -> None:
    settings = tmp_path / "cluster.yaml"
    settings.write_text(yaml.safe_dump({"scaling": {"budget_gpus": 3, "dry_run": True, "interval_s": 0.05}}))
    target = ["--target", f"127.0.0.1:{running.router.port}"]
    nothing = CliRunner().invoke(app, ["explain", "scaling", *target])
    assert nothing.exit_code == 0, nothing.output
    assert "no scaling decision has been recorded" in nothing.output
    watch = ["scaling", "--config", str(settings), "--looks", "3", "--record", *target]
    assert CliRunner().invoke(app, watch).exit_code == 0
    told = CliRunner().invoke(app, ["explain", "scaling", *target])
    assert told.exit_code == 0, told.output
    assert "1 prefill and 1 decode workers are wanted, 0 and 1 were ready; 1 of 3 GPUs held" in told.output
    assert "0 + 1 → 1 + 1" in told.output
    assert "dry run" in told.output
    told = CliRunner().invoke(app, ["explain", "scaling", "--json", "--last", "2", *target])
    data = json.loads(told.output)
    assert (data["decisions_total"], len(data["decisions"]), len(data["points"])) == (3, 2, 3)
    assert data["current"]["numbers"]["budget_gpus"] == 3
    assert data["current"]["dry_run"]


def test_a_router_that_cannot_record_is_named_and_the_watch_goes_on(
    running: InProcessRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(channel: object, decision: object) -> None:
        raise RequestFailed("PERMISSION_DENIED", "it needs an admin key")

    monkeypatch.setattr("deploy.scaling_cli.tell_scaling", refuses)
    settings = tmp_path / "cluster.yaml"
    settings.write_text(yaml.safe_dump({"scaling": {"budget_gpus": 3, "dry_run": True, "interval_s": 0.05}}))
    target = f"127.0.0.1:{running.router.port}"
    done = CliRunner().invoke(
        app, ["scaling", "--config", str(settings), "--looks", "2", "--record", "--target", target]
    )
    assert done.exit_code == 0
    assert done.stderr.count("PERMISSION_DENIED: it needs an admin key") == 2


def test_without_a_budget_it_says_what_to_set() -> None:
    done = CliRunner().invoke(app, ["scaling"])
    assert done.exit_code == 1
    assert "set scaling.budget_gpus" in done.output
