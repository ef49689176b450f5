"""The chart's pods under Ray: nodes started as KubeRay starts them, and pods deleted with answers under way.

What KubeRay does is done here: `ray start` with what the groups say, the token, and the deployment (`diptych up
--ray-address`). All nodes are on this machine, so workers choose their ports.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.clients import health_of
from tests.cluster.test_pods import Answers
from tests.support import chart, manifests
from tests.support.pods import ROOT, Pod, wait_until
from tests.support.processes import Reply, free_port

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]

_OBJECTS = str(80 << 20)


class RayPods:
    """A head, a router, a prefill worker and two decode workers, by the manifests of values/gpu-tcp.yaml."""

    def __init__(self, home: Path, small_model: Path) -> None:
        (service,) = [
            t for t in manifests.load((chart.RENDERED / "gpu-tcp.yaml").read_text()) if t["kind"] == "RayService"
        ]
        cluster = service["spec"]["rayClusterConfig"]
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
        self._token, self._temp = secrets.token_hex(32), home / "ray"
        self.head = Pod(0, "head", cluster["headGroupSpec"]["template"], home)
        port = free_port()
        self.address = f"{self.head.ip}:{port}"
        flags = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self._temp}"]
        self._ray(self.head, [*flags, *(f"--{k}={v}" for k, v in cluster["headGroupSpec"]["rayStartParams"].items())])
        self.pods = [self.head]
        self._wait_for(self.head)  # as the operator's init container does
        self.by_group: dict[str, list[Pod]] = {}
        for group, count in (("router", 1), ("prefill", 1), ("decode", 2)):
            for _ in range(count):
                pod = Pod(len(self.pods), f"{group}-{len(self.pods)}", groups[group]["template"], home)
                offered = {name: float(number) for name, number in groups[group]["resources"].items()}
                self._ray(pod, [f"--address={self.address}", "--num-cpus=1", f"--resources={json.dumps(offered)}"])
                self._wait_for(pod)  # one after the other: a busy machine takes long over each
                self.pods.append(pod)
                self.by_group.setdefault(group, []).append(pod)
        self.config = self._here(application["args"], small_model)
        self.target = f"127.0.0.1:{self.config['router']['grpc_port']}"
        path = home / "cluster.yaml"
        path.write_text(yaml.safe_dump(self.config))
        self._log = home / "operator.log"
        command = [sys.executable, "-m", "deploy.cli", "up", "--config", str(path), "--ray-address", self.address]
        with self._log.open("wb") as log:
            self.operator = subprocess.Popen(command, env=self._environment(self.head), stdout=log, stderr=log)

    def _here(self, args: dict[str, Any], model: Path) -> dict[str, Any]:
        """Smaller, without GPUs, and with ports that are free on this machine."""
        for pool, replicas in (("prefill", 1), ("decode", 2)):
            args[pool] = {**args[pool], "replicas": replicas, "num_gpus": 0, "engine": {}}
        args.pop("scaling")
        args["model"] = str(model)
        args["engine"] = {"dtype": "float32", "threads": 1, "num_blocks": 300, "kernels": "torch"}
        args["transport"] = {"ucx_net_devices": "lo"}
        args["worker"]["port"] = 0
        args["router"]["replicas"] = 1
        args["router"] |= {name: free_port() for name in ("grpc_port", "http_port", "internal_port")}
        args["telemetry"] |= {"metrics_port": 0, "worker_metrics_port": 0}
        return args

    def _environment(self, pod: Pod) -> dict[str, str]:
        """With what the operator adds."""
        patience = {"RAY_raylet_start_wait_time_s": "120", "RAY_worker_niceness": "0"}
        return {**pod.environment(), **patience, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}

    def _ray(self, pod: Pod, flags: list[str]) -> None:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={pod.ip}",
            f"--object-store-memory={_OBJECTS}", "--disable-usage-stats", *flags,
        ]  # fmt: skip
        with pod.log.open("ab") as log:
            pod.process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(pod), stdout=log, stderr=log, start_new_session=True
            )

    def _wait_for(self, pod: Pod) -> None:
        wait_until(lambda: "Ray runtime started" in pod.log.read_text(), 150, f"Ray on {pod.name}", [pod])

    def said(self) -> str:
        return self._log.read_text() + "\n".join(pod.said() for pod in self.pods)

    def close(self) -> None:
        self.operator.kill()
        self.operator.wait(10)
        for pod in self.pods:
            if pod.process is not None and pod.process.poll() is None:
                pod.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 15
        for pod in self.pods:
            if pod.process is not None:
                try:
                    pod.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    pod.kill()


@pytest.fixture
def ray_pods(small_model: Path) -> Iterator[RayPods]:
    # Not below pytest's own: the names of Ray's sockets may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as directory:
        made = RayPods(Path(directory), small_model)
        try:
            yield made
        finally:
            made.close()


def drained(pod: Pod) -> bool:
    """By the hook alone; whether the node then ends well is Ray's."""
    hook = pod.prestop()
    assert hook.returncode == 0, hook.stdout + hook.stderr
    return hook.stdout.startswith("drained")


def test_pods_that_are_deleted_lose_nothing(ray_pods: RayPods, tokenizer: Any) -> None:
    def serving() -> bool:
        assert ray_pods.operator.poll() is None, ray_pods.said()
        return health_of(ray_pods.target, 2) == "SERVING" and all(replicas(pod) for pod in ray_pods.pods[1:])

    wait_until(serving, 300, "a cluster that serves", ray_pods.pods)
    answers = Answers(ray_pods.target, tokenizer)
    answers.begin()
    wait_until(answers.under_way, 60, "tokens of all answers", ray_pods.pods)
    (leaving, other) = ray_pods.by_group["decode"]
    if not busy(leaving, answers):
        leaving, other = other, leaving
    began = time.monotonic()
    assert drained(leaving)
    assert time.monotonic() - began < leaving.grace_s
    leaving.kill()  # at once, whatever it would still do: it has nothing left
    answers.assert_exact()

    (router,) = ray_pods.by_group["router"]
    answers.begin()
    wait_until(answers.under_way, 60, "tokens of all answers", [ray_pods.head, router, other])
    said: list[bool] = []
    ending = threading.Thread(target=lambda: said.append(drained(router)))
    ending.start()
    one_more = Reply()
    answers.ask(0, one_more)
    ending.join(router.grace_s)
    assert said == [True]
    router.kill()
    answers.assert_exact()
    assert one_more.token_ids == answers.expected[0]


def replicas(pod: Pod) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in pod.mounts["/run/diptych"].glob("replica-*")]


def busy(pod: Pod, answers: Answers) -> bool:
    """Workers are called by their process."""
    return any(str(pid) in reply.started.route.decode_worker for pid in replicas(pod) for reply in answers.replies)
