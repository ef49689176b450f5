"""A real Kubernetes API server with its etcd, on loopback: no nodes, no controllers, nothing runs.

$KUBEBUILDER_ASSETS names a folder with the programs `kube-apiserver` and `etcd`, as `setup-envtest use -p path` prints
it. $DIPTYCH_TEST_CRDS names files and folders with CRDs, separated by colons: KubeRay's, and those of whatever else a
values file uses. kubectl and helm are those of tests/support/kube_tools.py.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support import kube_tools

_START_S, _STOP_S, _COMMAND_S = 120.0, 15.0, 120.0
_CONDITIONS = "{range .status.conditions[*]}{.type}={.status} {end}"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ApiServer:
    """Ready when made. `close` ends both programs."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._running: list[subprocess.Popen[bytes]] = []
        self._token = secrets.token_hex(16)
        self.kubeconfig = home / "kubeconfig"
        try:
            self._start(*(_program(name) for name in ("etcd", "kube-apiserver")))
        except BaseException:
            self.close()
            raise

    def kubectl(self, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return self._told([str(kube_tools.kubectl()), "--kubeconfig", str(self.kubeconfig), *words], given)

    def helm(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self._told([kube_tools.helm(), "--kubeconfig", str(self.kubeconfig), *words], "")

    def define(self, crd: dict[str, Any]) -> None:
        """Server-side: larger than what an annotation holds."""
        words = ("apply", "--server-side", "--force-conflicts", "-f", "-")
        done = self.kubectl(*words, given=yaml.safe_dump(crd))
        assert done.returncode == 0, done.stderr
        name, deadline = f"crd/{crd['metadata']['name']}", time.monotonic() + _START_S
        while "Established=True" not in self.kubectl("get", name, "-o", f"jsonpath={_CONDITIONS}").stdout:
            assert time.monotonic() < deadline, f"{name} is not established"
            time.sleep(0.1)

    def close(self) -> None:
        for process in reversed(self._running):
            process.terminate()
        for process in reversed(self._running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
            process.kill()
            process.wait()

    def _told(self, command: list[str], given: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HOME": str(self._home)}
        return subprocess.run(
            command, input=given, capture_output=True, text=True, check=False, timeout=_COMMAND_S, env=environment
        )

    def _start(self, etcd: str, server: str) -> None:
        store, peers, port = (_free_port() for _ in range(3))
        self._run(
            "etcd", etcd, f"--data-dir={self._home / 'etcd'}", "--unsafe-no-fsync",
            f"--listen-client-urls=http://127.0.0.1:{store}", f"--advertise-client-urls=http://127.0.0.1:{store}",
            f"--listen-peer-urls=http://127.0.0.1:{peers}",
        )  # fmt: skip
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        (self._home / "accounts.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (self._home / "tokens.csv").write_text(f"{self._token},admin,1,system:masters\n")
        self._run(
            "kube-apiserver", server, f"--etcd-servers=http://127.0.0.1:{store}", "--bind-address=127.0.0.1",
            f"--secure-port={port}", f"--cert-dir={self._home / 'certificates'}", "--authorization-mode=RBAC",
            f"--token-auth-file={self._home / 'tokens.csv'}", "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._home / 'accounts.key'}",
            f"--service-account-signing-key-file={self._home / 'accounts.key'}",
            "--service-cluster-ip-range=10.0.0.0/24", "--disable-admission-plugins=ServiceAccount",
        )  # fmt: skip
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
                    "users": [{"name": "admin", "user": {"token": self._token}}],
                    "clusters": [
                        {
                            "name": "test",
                            "cluster": {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True},
                        }
                    ],
                }
            )
        )
        self._wait(f"https://127.0.0.1:{port}/readyz")

    def _run(self, name: str, *command: str) -> None:
        with (self._home / f"{name}.log").open("wb") as log:
            self._running.append(subprocess.Popen(command, cwd=self._home, stdout=log, stderr=log))

    def _wait(self, url: str) -> None:
        unchecked = ssl._create_unverified_context()  # made by the server a moment ago, on loopback
        asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {self._token}"})
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            for process in self._running:
                assert process.poll() is None, self._said()
            with contextlib.suppress(OSError), urllib.request.urlopen(asked, timeout=2.0, context=unchecked) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        raise AssertionError(f"no API server within {_START_S:g} s\n{self._said()}")

    def _said(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(self._home.glob("*.log")))


def crds() -> Iterator[dict[str, Any]]:
    """Those that $DIPTYCH_TEST_CRDS names; what else lies there is passed over."""
    for place in filter(None, os.environ.get("DIPTYCH_TEST_CRDS", "").split(":")):
        path = Path(place)
        for file in sorted(path.rglob("*.yaml")) if path.is_dir() else [path]:
            for thing in yaml.load_all(file.read_text(), _LOADER):
                if isinstance(thing, dict) and thing.get("kind") == "CustomResourceDefinition":
                    yield thing


def _program(name: str) -> str:
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder:
        pytest.skip("KUBEBUILDER_ASSETS names no folder with kube-apiserver and etcd (setup-envtest use -p path)")
    found = shutil.which(name, path=folder)
    assert found is not None, f"no {name} in KUBEBUILDER_ASSETS={folder}"
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
