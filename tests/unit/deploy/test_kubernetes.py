"""The manifests, as far as they can be checked without a cluster (docs/operations.md, "Kubernetes")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deploy.config import ClusterConfig
from settings.file import validate_settings

MANIFEST = Path(__file__).resolve().parents[3] / "deploy" / "kubernetes" / "rayservice.yaml"


def documents() -> dict[str, Any]:
    return {d["kind"]: d for d in yaml.safe_load_all(MANIFEST.read_text())}


def groups() -> list[Any]:
    return documents()["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]


def pods() -> list[Any]:
    head = documents()["RayService"]["spec"]["rayClusterConfig"]["headGroupSpec"]
    return [g["template"] for g in [head, *groups()]]


def test_the_served_configuration_is_one_that_diptych_accepts() -> None:
    serve = yaml.safe_load(documents()["RayService"]["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    assert application["import_path"] == "deploy.app:build"
    assert application["route_prefix"] is None
    config = validate_settings(application["args"], ClusterConfig, "rayservice.yaml")
    pools = {
        "prefill": config.prefill.resources,
        "decode": config.decode.resources,
        "router": config.ray.router_resources,
    }
    offered = {g["groupName"]: g["rayStartParams"]["resources"] for g in groups()}
    for name, resources in pools.items():
        assert list(resources) == [name]
        assert f'\\"{name}\\": 1' in offered[name], "the pool's resource is offered by its group alone"
    for role in ("prefill", "decode"):
        assert config.worker_settings(role).worker.port == 8200
        assert config.worker_settings(role).worker.drain_s < 120


def test_kuberay_rules() -> None:
    cluster = documents()["RayService"]["spec"]["rayClusterConfig"]
    assert isinstance(cluster["rayVersion"], str)
    assert cluster["authOptions"] == {"mode": "token"}, "whoever reaches Ray's ports could run code"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in groups():
        assert len(f"diptych-{group['groupName']}") <= 47
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert "grpc" in container["readinessProbe"], "KubeRay's default probe would keep the pod unready"
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 75, "longer than the drain"
    for pod in pods():
        for container in pod["spec"]["containers"]:
            names = {e["name"] for e in container["env"]}
            assert "RAY_AUTH_MODE" not in names, "the operator sets it, by authOptions"
            assert "lifecycle" not in container, "a preStop `ray stop` would drop what is in flight"


def test_clients_reach_ready_routers_only() -> None:
    service = documents()["Service"]
    selector = service["spec"]["selector"]
    chosen = [g for g in groups() if selector.items() <= g["template"]["metadata"]["labels"].items()]
    assert [g["groupName"] for g in chosen] == ["router"]
    ports = {p["name"] for p in chosen[0]["template"]["spec"]["containers"][0]["ports"]}
    assert [p["targetPort"] for p in service["spec"]["ports"]] == ["grpc", "http"]
    assert {"grpc", "http"} <= ports
