"""A cluster under Ray, which would run anybody's code: all of it on loopback, and none of it without a token.

One cluster for the file. The attackers here are local users: they reach loopback, and they know Ray.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import yaml
from diptych.v1 import cluster_pb2, cluster_pb2_grpc

from tests.security.test_doors import eventually
from tests.security.test_listeners import open_ports, said
from tests.support.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]  # Ray takes its time on a busy machine

# What runs code, or leads to it, in each of Ray's services; and one that tells whether a port speaks gRPC at all.
METHODS = (
    "/ray.rpc.JobInfoGcsService/AddJob",
    "/ray.rpc.ActorInfoGcsService/RegisterActor",
    "/ray.rpc.InternalKVGcsService/InternalKVPut",
    "/ray.rpc.NodeInfoGcsService/RegisterNode",
    "/ray.rpc.NodeManagerService/RequestWorkerLease",
    "/ray.rpc.ObjectManagerService/Push",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.CoreWorkerService/KillActor",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.LogService/ListLogs",
    "/ray.serve.ASGIService/HandleRequest",  # unpickles what comes
)


@dataclass
class Up:
    process: subprocess.Popen[str]
    directory: Path
    token: str
    target: str

    @property
    def ports(self) -> set[tuple[str, int]]:
        return open_ports(self.process.pid)

    def address(self) -> str:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if process.name() == "gcs_server":
                (port,) = [p for _, p in open_ports(process.pid)]
                return f"127.0.0.1:{port}"
        raise AssertionError("no gcs_server is running")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """As a careless environment would start it: authentication off, the network's address."""
    where = tmp_path_factory.mktemp("ray")
    short = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    token, port = secrets.token_hex(32), free_port()
    (where / "token").write_text(token)
    (where / "token").chmod(0o600)
    config = {
        "engine": {"num_blocks": 120},
        "ray": {"token_file": str(where / "token")},
        "router": {"grpc_port": port, "internal_port": free_port(), "http_port": free_port()},
        "telemetry": {"metrics_port": 0},
    }
    (where / "cluster.yaml").write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "DIPTYCH_RAY_TMP": str(short),
        "RAY_ADDRESS": "192.0.2.1:1",
    }
    with (where / "err").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "up", "--config", str(where / "cluster.yaml"), "--ray",
             "--timeout", "500"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready: "), (line, (where / "err").read_text())
        yield Up(process, short, token, f"127.0.0.1:{port}")
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()
        process.stdout.close()
        shutil.rmtree(short, ignore_errors=True)


def test_nothing_listens_beyond_loopback_ray_included(up: Up) -> None:
    names = {p.name() for p in psutil.Process(up.process.pid).children(recursive=True)}
    assert {"gcs_server", "raylet"} <= names
    assert len(up.ports) > 10
    assert {host for host, _ in up.ports} == {"127.0.0.1"}


def test_every_open_port_of_routers_and_workers_is_listed(up: Up) -> None:
    """Serve opens a replica's last port when the replica is ready, so a while after the first answer."""

    def all_listed() -> bool:
        with grpc.insecure_channel(up.target) as channel:
            asked = cluster_pb2.GetClusterRequest()
            state = cluster_pb2_grpc.ClusterServiceStub(channel).GetCluster(asked, timeout=20)
        listed = [state.cluster.router.listeners, *(w.listeners for w in state.cluster.workers)]
        replicas = [
            p
            for p in psutil.Process(up.process.pid).children(recursive=True)
            if p.name().startswith("ray::ServeRepl") and open_ports(p.pid)
        ]
        of_ray = [[x.authentication for x in one if x.protocol == "Ray"] for one in listed]
        of_serve = [[x.authentication for x in one if x.protocol == "Ray Serve"] for one in listed]
        unknown = [x for one in listed for x in one if x.protocol == "unknown"]
        return (
            {frozenset(said(one)) for one in listed} == {frozenset(open_ports(p.pid)) for p in replicas}
            and of_ray == of_serve == [["Ray's token"]] * 3
            and not unknown
        )

    eventually(all_listed, 60.0)


def call(port: int, method: str, token: str | None) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        ask = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            ask(b"", metadata=metadata, timeout=10)
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined]
        return grpc.StatusCode.OK


def test_no_port_of_rays_takes_a_call_without_the_token(up: Up) -> None:
    ours = int(up.target.split(":")[1])
    refused = set()
    for _, port in sorted(up.ports):
        for method in METHODS:
            for token in (None, "0" * 64):
                code = call(port, method, token)
                if code is grpc.StatusCode.UNAVAILABLE:
                    break  # no gRPC here: the next test
                assert code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED) or (
                    port == ours and code is grpc.StatusCode.PERMISSION_DENIED
                ), (port, method, code)
                if code is grpc.StatusCode.UNAUTHENTICATED:
                    refused.add(method)
    assert {"/ray.rpc.JobInfoGcsService/AddJob", "/ray.serve.ASGIService/HandleRequest"} <= refused
    assert len(refused) >= 7, "the methods above are Ray's"
    alive = "/ray.rpc.NodeInfoGcsService/CheckAlive"
    gcs = int(up.address().split(":")[1])
    assert call(gcs, alive, up.token) is grpc.StatusCode.OK, "the token is what was missing"


def test_no_port_takes_a_job_over_http_without_the_token(up: Up) -> None:
    marker = up.directory / "marker"
    body = f'{{"entrypoint": "touch {marker}"}}'.encode()
    answers = {}
    for _, port in sorted(up.ports):
        for path in ("/api/job_agent/jobs/", "/api/jobs/", "/get_or_create_runtime_env"):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}", body, {"content-type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    answers[port, path] = answer.status
            except urllib.error.HTTPError as error:
                answers[port, path] = error.code
                error.close()
            except (OSError, http.client.HTTPException):
                continue  # not HTTP
    assert 401 in answers.values()
    # 200: the metrics pages of Ray, which answer the same to every path.
    taken = {where for where, status in answers.items() if status == 200}
    for port, path in taken:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as page:
            assert b"# HELP" in page.read(), (port, path)
    assert not marker.exists()


JOIN = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("JOINED", ray.get(ray.remote(lambda: 1).remote(), timeout=20))
"""


@pytest.mark.parametrize(
    "environment", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}]
)
def test_a_process_without_the_token_cannot_join(up: Up, tmp_path: Path, environment: dict[str, str]) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", JOIN, up.address()],
        cwd=tmp_path,
        env={**clean, **loopback, **environment}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "JOINED" not in done.stdout
    assert "token" in done.stderr


def test_rays_files_are_below_a_directory_of_its_users_own(up: Up) -> None:
    (found,) = up.directory.iterdir()
    assert found.name == f"diptych-{os.getuid()}"
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    assert (found / "ray" / "session_latest").exists()
    texts = io.StringIO()
    for path in (found / "ray").rglob("*"):
        if path.is_file():
            texts.write(path.read_bytes().decode(errors="replace"))
    assert up.token not in texts.getvalue()
