"""`diptych simulate`, `diptych plan` and the replay of traces, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy import simulate
from deploy.bench import replay
from deploy.cli import app
from simulator.traces import Trace, TraceRequest

TRACE = "arrival_s,input_tokens,output_tokens\n" + "".join(
    f"{i / 5},{300 + 40 * (i % 30)},{5 + i % 20}\n" for i in range(60)
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_simulate_writes_a_report(trace: Path, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("prefill: {workers: 1}\ndecode: {workers: 2}\nitl_target_ms: 40\n")
    out = tmp_path / "report"
    size = ["--seeds", "2", "--requests", "50", "--rates", "5,10"]
    done = CliRunner().invoke(
        app, ["simulate", "--trace", str(trace), "--cluster", str(cluster), *size, "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "not measured on a GPU" in done.output
    report = json.loads((out / "report.json").read_text())
    assert [round(row["requests_per_s"]) for row in report["curve"]] == [5, 10]
    assert report["curve"][0]["attainment"]["mean"] == 1.0
    assert report["utilisation"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 6
    assert "Inter-token latency" in page


def test_plan_prints_shape_cost_and_every_assumption(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "_PLAN_LEAST_S", 2.0)  # its words are checked here, not its figures
    prices = tmp_path / "prices.yaml"
    prices.write_text("api_input: 0.5\napi_output: 1.5\n")
    size = ["--gpu-hour", "2", "--workers", "2", "--requests", "40"]
    done = CliRunner().invoke(app, ["plan", "--trace", str(trace), *size, "--prices", str(prices)])
    assert done.exit_code == 0, done.output
    for words in ("per million tokens", "through the API", "What this rests on", "$2 an hour"):
        assert words in done.output


def test_plan_compares_degrees(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "_PLAN_LEAST_S", 0.2)
    size = ["--gpu-hour", "2", "--workers", "3", "--requests", "12"]
    done = CliRunner().invoke(app, ["plan", "--trace", str(trace), *size, "--tp", "1,2"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for words in ("x TP 1", "x TP 2", "All-reduces", "for decode:", "not measured on a GPU", "NVLink"):
        assert words in done.output
    done = CliRunner().invoke(app, ["plan", "--trace", str(trace), *size, "--tp", "1", "--json"])
    said = json.loads(done.stdout)
    assert [one["degree"] for one in said["degrees"]] == [1]
    assert said["pairs"][0]["split"]["decode_degree"] == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--tp", "3"], "give degrees out of 1, 2, 4 and 8"),
        (["--tp", "two"], "give degrees out of 1, 2, 4 and 8"),
        (["--tp", "4"], "too few for a prefill and a decode worker"),
        (["--tp", "1", "--emit", "values.yaml"], "leave out --emit"),
    ],
)
def test_degrees_that_cannot_be_compared(trace: Path, options: list[str], why: str) -> None:
    size = ["--gpu-hour", "2", "--workers", "4", "--requests", "40"]
    done = CliRunner().invoke(app, ["plan", "--trace", str(trace), *size, *options], env={"COLUMNS": "200"})
    assert done.exit_code != 0
    assert why in done.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--policy", "best"], "always-split"),
        (["--rates", "4;5"], "commas"),
        (["--cluster", "absent.yaml"], "no such file"),
    ],
)
def test_bad_input_is_refused_before_any_work(trace: Path, arguments: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, ["simulate", "--trace", str(trace), *arguments])
    assert done.exit_code == 1
    assert complaint in " ".join(done.output.split())


def test_a_replay_keeps_times_lengths_and_shared_prefixes() -> None:
    played = Trace("t", [TraceRequest(0.0, 70, 3, (1, 2)), TraceRequest(1.5, 50, 4, (1,))], block_tokens=32)
    a, b = replay(played)
    assert (len(a.prompt), a.max_tokens, a.due_s) == (70, 3, 0.0)
    assert (len(b.prompt), b.max_tokens, b.due_s) == (50, 4, 1.5)
    assert a.prompt[:32] == b.prompt[:32]
    assert a.prompt[32:50] != b.prompt[32:50]
