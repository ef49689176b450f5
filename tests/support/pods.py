"""Pods of the chart as processes of this machine, and a kubelet for them.

A pod has an address of its own (127.N.x.y, so that all have the ports of the chart), its mounts as directories, its
variables, its command. The kubelet probes it as its template says, and ends it as Kubernetes does: preStop, SIGTERM to
the container's first process, SIGKILL when the grace period is over.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from deploy.clients import health_of
from settings.process import LAST_WORDS

ROOT = Path(__file__).resolve().parents[2]
_NETWORK = f"127.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"


class Pod:
    def __init__(self, number: int, name: str, template: dict[str, Any], home: Path) -> None:
        self.ip = f"{_NETWORK}.{10 + number}"
        self.name, self.spec = name, template["spec"]
        self.container = self.spec["containers"][0]
        self.home = home / name
        self.mounts: dict[str, Path] = {}
        for mount in self.container["volumeMounts"]:
            self.mounts[mount["mountPath"]] = self.home / mount["name"]
            (self.home / mount["name"]).mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = self.home / "log"
        self.termination_log = self.home / "termination-log"

    @property
    def grace_s(self) -> float:
        return self.spec["terminationGracePeriodSeconds"]

    def port(self, name: str) -> int:
        (found,) = [port["containerPort"] for port in self.container["ports"] if port["name"] == name]
        return found

    def here(self, word: str) -> str:
        """As it is on this machine."""
        paths = "|".join(map(re.escape, sorted(self.mounts, key=len, reverse=True)))
        word = re.sub(rf"(^|=|:)({paths})(?=/|$)", lambda found: f"{found[1]}{self.mounts[found[2]]}", word)
        return word.replace("localhost:", f"{self.ip}:")

    def environment(self) -> dict[str, str]:
        own = {
            variable["name"]: self.here(variable["value"]) for variable in self.container["env"] if "value" in variable
        }
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        path = os.pathsep.join([str(ROOT), str(ROOT / "proto")])
        more = {
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "POD_IP": self.ip,
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.home / "home"),
            LAST_WORDS: str(self.termination_log),  # which the kubelet mounts
        }
        return {**kept, **own, **more}

    def command(self, words: list[str]) -> list[str]:
        words = [self.here(word).replace("$(POD_IP)", self.ip) for word in words]
        return [sys.executable, "-m", "deploy.cli", *words[1:]] if words[0] == "diptych" else words

    def start(self, words: list[str] | None = None) -> None:
        command = self.command(words or [*self.container["command"], *self.container.get("args", [])])
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.home, env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )

    # As the kubelet does.

    def probe(self, which: str) -> bool:
        probe = self.container[which]
        timeout_s = probe["timeoutSeconds"]
        if "grpc" in probe:
            return health_of(f"{self.ip}:{probe['grpc']['port']}", timeout_s) == "SERVING"
        if "tcpSocket" in probe:
            with contextlib.suppress(OSError):
                socket.create_connection((self.ip, probe["tcpSocket"]["port"]), timeout_s).close()
                return True
            return False
        if "httpGet" in probe:
            asked = probe["httpGet"]
            port = asked["port"] if isinstance(asked["port"], int) else self.port(asked["port"])
            try:
                with urllib.request.urlopen(f"http://{self.ip}:{port}{asked['path']}", timeout=timeout_s) as answer:
                    return 200 <= answer.status < 400
            except (OSError, urllib.error.HTTPError):
                return False
        done = subprocess.run(
            self.command(probe["exec"]["command"]), env=self.environment(), capture_output=True, check=False,
            timeout=timeout_s,
        )  # fmt: skip
        return done.returncode == 0

    def prestop(self) -> subprocess.CompletedProcess[str]:
        words = self.container["lifecycle"]["preStop"]["exec"]["command"]
        return subprocess.run(
            self.command(words), env=self.environment(), capture_output=True, text=True, check=False,
            timeout=self.grace_s,
        )  # fmt: skip

    def delete(self) -> tuple[int, float]:
        """The exit code of the container (-9: it was killed) and how long it took."""
        assert self.process is not None
        began = time.monotonic()
        hook = self.prestop()
        assert hook.returncode == 0, hook.stdout + hook.stderr
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(max(0.0, self.grace_s - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            self.kill()
        return self.process.returncode, time.monotonic() - began

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)

    def said(self) -> str:
        return f"--- {self.name}\n{self.log.read_text() if self.log.exists() else ''}"


def wait_until(condition: Any, timeout_s: float, what: str, pods: list[Pod]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        for pod in pods:
            assert pod.process is None or pod.process.poll() is None, pod.said()
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}\n" + "\n".join(p.said() for p in pods)
        time.sleep(0.05)
