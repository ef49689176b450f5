"""The secured overlay, as far as it can be checked without a cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deploy.config import ClusterConfig
from settings.file import read_settings, validate_settings
from settings.security import SecurityConfig

HERE = Path(__file__).resolve().parents[3] / "deploy"
SECURED, BASE = HERE / "kubernetes-secured", HERE / "kubernetes" / "rayservice.yaml"


def operations() -> list[dict[str, Any]]:
    return yaml.safe_load((SECURED / "rayservice-patch.yaml").read_text())


def groups() -> list[dict[str, Any]]:
    (service,) = [d for d in yaml.safe_load_all(BASE.read_text()) if d["kind"] == "RayService"]
    return service["spec"]["rayClusterConfig"]["workerGroupSpecs"]


def served() -> ClusterConfig:
    args = yaml.safe_load(operations()[0]["value"])["applications"][0]["args"]
    return validate_settings(args, ClusterConfig, "overlay")


def test_it_is_the_base_with_security_on() -> None:
    config = served()
    (service,) = [d for d in yaml.safe_load_all(BASE.read_text()) if d["kind"] == "RayService"]
    base = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert config == validate_settings({**base, "security": config.security.model_dump()}, ClusterConfig, "base")
    assert not config.security.insecure_ok
    listeners = [("h", config.router.host, "public"), ("i", config.worker.host, "internal")]
    assert not config.security.exposed(listeners)
    assert read_settings(SECURED / "security.yaml", ClusterConfig).security == config.security


def test_each_process_finds_its_files_and_no_others() -> None:
    mounted: dict[int, set[str]] = {}
    for op in operations()[1:]:
        index, what = re.fullmatch(r".*workerGroupSpecs/(\d+)/(.*)", op["path"]).groups()  # type: ignore[union-attr]
        if what.endswith("volumes/-"):
            sources = op["value"]["projected"]["sources"]
            mounted[int(index)] = {s["secret"]["name"] for s in sources if "secret" in s}
        elif what.endswith("readinessProbe"):
            port = re.search(r"localhost:(\d+)", str(op["value"])).group(1)  # type: ignore[union-attr]
            container = groups()[int(index)]["template"]["spec"]["containers"][0]
            assert int(port) == container["readinessProbe"]["grpc"]["port"]
    names = [g["groupName"] for g in groups()]
    assert {names[i]: found for i, found in mounted.items()} == {
        "router": {"diptych-router", "diptych-cluster-secret", "diptych-api-keys"},
        "prefill": {"diptych-worker", "diptych-cluster-secret"},
        "decode": {"diptych-worker", "diptych-cluster-secret"},
    }


def test_only_the_public_ports_of_routers_are_open_to_clients() -> None:
    policies = {
        d["metadata"]["name"]: d["spec"] for d in yaml.safe_load_all((SECURED / "networkpolicy.yaml").read_text())
    }
    clients = policies["diptych-clients"]
    assert clients["podSelector"]["matchLabels"] == groups()[0]["template"]["metadata"]["labels"]
    router = served().router
    assert {p["port"] for p in clients["ingress"][0]["ports"]} == {router.grpc_port, router.http_port}
    assert all("from" in rule for rule in policies["diptych-inside"]["ingress"])


def test_the_files_of_the_instructions_are_those_that_certs_writes(tmp_path: Path) -> None:
    from deploy.certificates import make_all

    written = {path.name for path in make_all(tmp_path, [], 1)} | {"keys.yaml"}
    named = set(re.findall(r"--from-file=tls/(\S+)", (SECURED / "kustomization.yaml").read_text()))
    assert named <= written
    used = re.findall(r"/etc/diptych/security/([\w.-]+)", (SECURED / "security.yaml").read_text())
    assert set(used) <= named
    assert SecurityConfig() == ClusterConfig().security
