"""The processes and the `diptych` command as a user meets them, Ray included."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import IO

import psutil
import pytest
import yaml

from tests.support.process_tree import descendants, runs
from tests.support.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
DIPTYCH = str(Path(sys.executable).parent / "diptych")


def run(*command: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


def module(name: str, config: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", name, "--config", str(config))


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(content) if not isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("decode_worker", {"engine": {"dtpye": "bfloat16"}}, "engine.dtpye: unknown key; did you mean dtype?"),
        ("decode_worker", {"engine": {"dtype": "int3"}}, "engine.dtype"),
        ("decode_worker", {"engine": {"model": "/no/such/place"}}, "there is no model at /no/such/place"),
        ("router", {"router": {"grpc_port": "many"}}, "router.grpc_port"),
        ("router", {"router": {"model": "/no/such/place"}}, "there is no model at /no/such/place"),
        ("router", "router: [1", "not valid YAML"),
    ],
)
def test_a_process_that_cannot_start_says_why(tmp_path: Path, name: str, content: object, words: str) -> None:
    if isinstance(content, dict) and name == "router":
        content = {"router": {"internal_port": 0, "grpc_port": 0, "http_port": 0, **content["router"]}}
    done = module(name, written(tmp_path, content))
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_settings_file_is_named() -> None:
    done = module("router", Path("/no/such/file.yaml"))
    assert done.returncode == 1
    assert "/no/such/file.yaml: there is no such file" in done.stderr


def test_a_port_in_use_is_named_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(DIPTYCH, "up", "--grpc-port", str(port), "--internal-port", str(free_port()))
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "--grpc-port" in done.stderr


def test_no_router_is_a_clear_error() -> None:
    done = run(DIPTYCH, "generate", "hi", "--target", f"localhost:{free_port()}")
    assert done.returncode == 1
    assert "no router answers" in done.stderr
    assert run(DIPTYCH, "status", "--target", f"localhost:{free_port()}").returncode == 1


def test_bad_options_are_clear_errors(tmp_path: Path) -> None:
    config = written(tmp_path, {"prefil": {"replicas": 2}})
    done = run(DIPTYCH, "up", "--config", str(config))
    assert done.returncode == 1
    assert "did you mean prefill?" in done.stderr
    done = run(DIPTYCH, "up", "--model", "/no/such/place")
    assert done.returncode == 1
    assert "there is no model at /no/such/place" in done.stderr
    assert run(DIPTYCH, "generate", "hi", "--placement", "sideways").returncode == 1


@pytest.mark.long  # what a process says is quick above; that Ray passes it on is this
@pytest.mark.timeout(240)
def test_under_ray_the_reason_of_a_replica_reaches_the_terminal(tmp_path: Path) -> None:
    """Found by the replica alone: the check of the model before it cannot know its machine."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a CUDA device")
    ports = {"grpc_port": free_port(), "http_port": free_port(), "internal_port": free_port()}
    settings = {"engine": {"device": "cuda"}, "router": ports, "telemetry": {"metrics_port": None}}
    done = run(DIPTYCH, "up", "--config", str(written(tmp_path, settings)), timeout_s=200)
    assert done.returncode == 1
    assert "worker cannot start: engine.device is cuda and torch sees no CUDA device; use cpu or auto" in done.stderr


@pytest.mark.timeout(240)
@pytest.mark.parametrize("ray", [True, False])
def test_up_generate_status_bench_and_a_clean_stop(tmp_path: Path, small_model: Path, ray: bool) -> None:
    port = free_port()
    target = f"localhost:{port}"
    http_port = free_port()
    model = {"model": str(small_model)} if ray else {}  # the embedded one
    name = small_model.name if ray else "smollm2-135m-instruct"
    settings = {"engine": {"num_blocks": 120}, "router": {"itl_target_ms": 20.0}, "telemetry": {"metrics_port": 0}}
    config = written(tmp_path, settings | model)
    command = [
        DIPTYCH,
        "up",
        "--config",
        str(config),
        "--grpc-port",
        str(port),
        "--internal-port",
        str(free_port()),
        "--http-port",
        str(http_port),
    ]
    with (tmp_path / "err").open("w") as errors:
        up = subprocess.Popen(
            [*command, "--ray" if ray else "--no-ray"], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert up.stdout is not None
    try:
        line = said(up.stdout, "ready: ", ray)
        assert line.startswith("ready: "), (line, (tmp_path / "err").read_text())
        assert f" serves {name} with 1 prefill and 1 decode workers" in line
        line = said(up.stdout, "OpenAI API: ", ray)
        assert line == f"OpenAI API: http://127.0.0.1:{http_port}/v1\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/v1/models", timeout=10) as models:
            assert json.load(models)["data"][0]["id"] == name
        text = "word " * 600
        split = ("--placement", "split")
        done = run(DIPTYCH, "generate", text, "--raw", "--target", target, "--max-tokens", "5", "--json", *split)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["route"]["placement"] == "split"
        assert len(answer["token_ids"]) == 5
        done = run(DIPTYCH, "generate", "Why?", "--target", target, "--max-tokens", "5", "--placement", "local")
        assert done.returncode == 0
        assert "local: " in done.stderr
        assert "TTFT" in done.stderr
        done = run(DIPTYCH, "status", "--target", target)
        assert done.returncode == 0
        assert "prefill" in done.stdout
        assert "serving" in done.stdout
        if not ray:  # which is nothing to a client
            measure_and_replay(target, tmp_path)
        done = run(DIPTYCH, "generate", "hi", "--target", target, "--max-tokens", "0")
        assert done.returncode == 1
        assert "INVALID_ARGUMENT: max_tokens is 0" in done.stderr
    finally:
        started = descendants(up.pid)
        up.send_signal(signal.SIGTERM)
        code = up.wait(60)
        up.stdout.close()
    assert code == 0, (tmp_path / "err").read_text()
    kinds = ("raylet", ":DecodeWorker", ":PrefillWorker") if ray else ("decode_worker --config",)
    for kind in kinds:
        assert any(kind in line for line in started.values()), f"{kind} is not among {started}"
    assert_all_gone(port, started)


def said(stdout: IO[str], beginning: str, ray: bool) -> str:
    """The next line; under Ray, which says there what it retries and what its workers log, the next of ours."""
    return next((line for line in stdout if not ray or line.startswith(beginning)), "")


def measure_and_replay(target: str, tmp_path: Path) -> None:
    report = tmp_path / "report"
    done = run(
        DIPTYCH, "bench", "--target", target, "--requests", "4", "--concurrency", "2", "--max-tokens", "4",
        "--long-tokens", "300", "--out", str(report),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((report / "result.json").read_text())["errors"] == 0
    assert (report / "latencies.png").exists()
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,60,8\n0.2,1200,6\n0.4,40,8\n")
    done = run(
        DIPTYCH, "bench", "--target", target, "--trace", str(trace), "--shorten", "2", "--rate", "10",
        "--out", str(report),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    replayed = json.loads((report / "result.json").read_text())
    assert replayed["errors"] == 0
    assert "trace.csv" in replayed["plan"]["trace"]


@pytest.mark.parametrize(
    ("ray", "number", "when"),
    [
        (False, signal.SIGINT, "starting processes"),
        pytest.param(True, signal.SIGTERM, "deploying router and workers", marks=pytest.mark.long),
        pytest.param(False, signal.SIGTERM, "waiting for", marks=pytest.mark.long),
        pytest.param(True, signal.SIGINT, "starting Ray", marks=pytest.mark.long),
        pytest.param(True, signal.SIGTERM, "starting Ray", marks=pytest.mark.long),
        pytest.param(True, signal.SIGINT, "starting Serve", marks=pytest.mark.long),
    ],
)
def test_a_cluster_that_starts_is_stopped_at_once(tmp_path: Path, ray: bool, number: int, when: str) -> None:
    port = free_port()
    ports = ("--grpc-port", str(port), "--internal-port", str(free_port()), "--http-port", str(free_port()))
    config = written(tmp_path, {"telemetry": {"metrics_port": 0}})
    up = subprocess.Popen(
        [DIPTYCH, "up", "--ray" if ray else "--no-ray", *ports, "--config", str(config)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert up.stderr is not None
    said = []
    for line in up.stderr:
        said.append(line)
        if when in line:
            break
    time.sleep(0.3)  # somewhere inside the stage
    started = descendants(up.pid)
    asked_at = time.monotonic()
    up.send_signal(number)
    rest = up.stderr.read()
    code = up.wait(60)
    up.stderr.close()
    assert code == 128 + number, (said, rest)
    assert time.monotonic() - asked_at < 20.0  # and not the 300 s of --timeout
    assert "stopped before it was ready; nothing is left running" in rest
    assert "Traceback" not in rest
    if not ray:
        assert said[0].startswith("logs: ")
        assert not Path(said[0].removeprefix("logs: ").strip()).exists()
    assert_all_gone(port, started)


def assert_all_gone(port: int, started: dict[psutil.Process, str]) -> None:
    """Nobody listens any more, and no process is left, of ours or of Ray's."""
    deadline = time.monotonic() + 10.0
    while True:
        left = [line for process, line in started.items() if runs(process)]
        with socket.socket() as probe:
            refused = probe.connect_ex(("127.0.0.1", port)) != 0
        if not left and refused:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
