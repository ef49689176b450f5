"""What the machine around a cluster may be like: IPv6, a proxy in the environment, few file descriptors."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from deploy.clients import health_of
from tests.cluster.test_commands import DIPTYCH, ROOT
from tests.support.processes import Cluster, free_port

NOBODY = "http://127.0.0.1:9"  # the discard port: a proxy that does not answer
PROXIED = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOBODY)
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_FILES = 256


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    """On ::1 in all its parts, and with a proxy in the environment that answers nobody."""
    cluster = Cluster(
        tmp_path_factory.mktemp("elsewhere"),
        small_model,
        engine={"num_blocks": 128},
        telemetry={"metrics_host": "::1"},
        host="::1",
        environment={**PROXIED, "no_proxy": "", "NO_PROXY": ""},
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **PROXIED, "no_proxy": "", "NO_PROXY": ""}
    return subprocess.run(
        [DIPTYCH, *words], cwd=ROOT, capture_output=True, text=True, timeout=90, check=False, env=environment
    )


def test_a_split_request_on_ipv6_loopback_past_a_dead_proxy(elsewhere: Cluster) -> None:
    done = command(
        "generate", "word " * 300, "--raw", "--target", elsewhere.target, "--max-tokens", "4", "--json",
        "--placement", "split",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4
    elsewhere.assert_nothing_left()


def test_status_and_listeners_show_addresses_that_can_be_dialled(elsewhere: Cluster) -> None:
    done = command("status", "--target", elsewhere.target, "--listeners")
    assert done.returncode == 0, done.stderr
    assert f"[::1]:{elsewhere.port}" in done.stdout
    assert "unknown" not in done.stdout
    for worker in elsewhere.cluster().workers:
        assert worker.address.startswith("[::1]:")
    assert command("health", "--target", elsewhere.target).returncode == 0


def test_http_and_metrics_on_ipv6(elsewhere: Cluster) -> None:
    with DIRECT.open(f"http://[::1]:{elsewhere.http_port}/v1/models", timeout=10) as models:
        assert json.load(models)["data"]
    targets = elsewhere.cluster().router.metrics_address
    assert targets.startswith("[::1]:")
    with DIRECT.open(f"http://{targets}/targets", timeout=10) as answer:
        told = [target for group in json.load(answer) for target in group["targets"]]
    assert len(told) == 3
    for target in told:
        assert target.startswith("[::1]:")
        with DIRECT.open(f"http://{target}/metrics", timeout=10) as metrics:
            assert b"diptych_" in metrics.read()


# File descriptors.


@pytest.fixture
def poor(tmp_path: Path, model_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """A router that may open 256 files: process, gRPC port, HTTP port."""
    grpc_port, http_port = free_port(), free_port()
    settings = {
        "router": {"model": str(model_path), "grpc_port": grpc_port, "http_port": http_port, "internal_port": 0},
        "telemetry": {"metrics_port": None},
    }
    (tmp_path / "router.yaml").write_text(yaml.safe_dump(settings))
    shell = f"ulimit -S -n 64; ulimit -H -n {_FILES}; exec {sys.executable} -m router --config {tmp_path}/router.yaml"
    with (tmp_path / "router.log").open("wb") as log:
        process = subprocess.Popen(["sh", "-c", shell], cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while health_of(f"127.0.0.1:{grpc_port}", 2.0) == "UNREACHABLE":
            assert process.poll() is None, (tmp_path / "router.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process, grpc_port, http_port
    finally:
        process.terminate()
        process.wait(30)


def test_more_connections_than_file_descriptors_cost_neither_log_nor_answers(
    poor: tuple[subprocess.Popen[bytes], int, int], tmp_path: Path
) -> None:
    process, grpc_port, http_port = poor
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (_FILES, _FILES)  # the soft limit was raised
    kept = http.client.HTTPConnection("127.0.0.1", http_port, timeout=10)
    kept.connect()
    with contextlib.ExitStack() as open_sockets:
        open_sockets.callback(kept.close)
        for port in (http_port, grpc_port):
            for _ in range(_FILES + 50):
                stranger = socket.create_connection(("127.0.0.1", port), timeout=10)
                open_sockets.enter_context(stranger)
        before = psutil.Process(process.pid).cpu_times()
        for _ in range(3):  # one that was there before is served all the time
            time.sleep(0.4)
            kept.request("GET", "/v1/models")
            answer = kept.getresponse()
            assert (answer.status, bool(answer.read())) == (200, True)
        after = psutil.Process(process.pid).cpu_times()
        assert psutil.Process(process.pid).num_fds() < _FILES
        assert after.user + after.system - before.user - before.system < 0.8  # it does not spin
    assert health_of(f"127.0.0.1:{grpc_port}", 10.0) == "NOT_SERVING"  # newcomers again, when the strangers are gone
    written = (tmp_path / "router.log").read_text()
    assert len(written) < 20_000
    assert f"may open {_FILES} files: connections are bounded" in written
