"""The Helm chart: rendered over a matrix of values, every object checked as an API server and KubeRay would, and what
the values cannot mean refused.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.config import ClusterConfig
from settings.file import validate_settings
from settings.process import LAST_WORDS
from tests.support import chart, kube_tools, manifests


def objects() -> Iterator[Any]:
    for path in chart.VALUES:
        yield pytest.param((path,), (), id=path.stem)
    for name, settings in chart.MATRIX.items():
        yield pytest.param((), settings, id=name)


@pytest.mark.parametrize(("values", "settings"), list(objects()))
def test_every_object_is_one_that_kubernetes_and_kuberay_take(
    values: tuple[Path, ...], settings: tuple[str, ...]
) -> None:
    rendered = chart.render(*values, settings=settings)
    names = [(thing["apiVersion"], thing["kind"], thing["metadata"]["name"]) for thing in rendered]
    assert len(names) == len(set(names))
    assert {
        name: found for name, thing in zip(names, rendered, strict=True) if (found := manifests.problems(thing))
    } == {}
    for config in configurations(rendered):
        assert validate_settings(config, ClusterConfig, "the chart")


def configurations(rendered: list[manifests.Object]) -> Iterator[dict[str, Any]]:
    """cluster.yaml, wherever the chart puts it."""
    for thing in rendered:
        if thing["kind"] == "RayService":
            (application,) = yaml.safe_load(thing["spec"]["serveConfigV2"])["applications"]
            yield application["args"]
        elif thing["kind"] == "ConfigMap" and "cluster.yaml" in thing["data"]:
            yield yaml.safe_load(thing["data"]["cluster.yaml"])


@pytest.mark.parametrize("path", chart.VALUES, ids=lambda path: path.stem)
def test_the_committed_manifests_are_those_of_the_chart(path: Path) -> None:
    """`make chart` writes them."""
    done = chart.template(path)
    assert done.returncode == 0, done.stderr
    assert (chart.RENDERED / path.name).read_text() == done.stdout


def test_helm_lints_it() -> None:
    for values in [[], *[["--values", str(path)] for path in chart.VALUES]]:
        done = subprocess.run(
            [kube_tools.helm(), "lint", "--strict", str(chart.CHART), *values],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


REFUSED = {
    "an unknown key": (['cluster.router.itl_target=5'], "itl_target"),
    "an unknown key of the chart": (['routers=2'], "routers"),
    "a wrong type": (['cluster.engine.block_tokens="many"'], "block_tokens"),
    "out of range": (['ports.grpc=70000'], "grpc"),
    "what the chart decides": (['cluster.router.grpc_port=1'], "grpc_port"),
    "an unknown key of a pool's engine": (['cluster.prefill.engine={"max_batch_token": 1}'], "max_batch_token"),
    "more workers than pods": (['cluster.decode.replicas=9'], "cluster.decode.replicas is 9"),
    "no pod to surge into": (['cluster.decode.replicas=8'], "cluster.decode.surge: 0"),
    "two actuators": (
        ['mode="deployments"', 'cluster.scaling={"budget_gpus": 4, "dry_run": true}',
         'autoscaling.hpa={"decode": {"minReplicas": 1, "maxReplicas": 2}}'],
        "two actuators",
    ),
    "hpa and keda": (
        ['mode="deployments"', 'autoscaling.hpa={"decode": {"minReplicas": 1, "maxReplicas": 2}}',
         'autoscaling.keda={"decode": {"minReplicas": 1, "maxReplicas": 2, "triggers": [{"type": "cpu"}]}}'],
        "drop one",
    ),
    "hpa under Ray": (['autoscaling.hpa={"decode": {"minReplicas": 1, "maxReplicas": 2}}'], "mode: deployments"),
    "hpa of nothing": (
        ['mode="deployments"', 'autoscaling.hpa={"decoder": {"minReplicas": 1, "maxReplicas": 2}}'], "no such group",
    ),
    "our policy without Ray": (
        ['mode="deployments"', 'cluster.scaling={"budget_gpus": 4, "dry_run": false}'], "mode: ray",
    ),
    "open to everybody": (['security.secrets.apiKeys=""'], "everybody could use the routers"),
    "a gateway without one": (['gateway.enabled=true'], "parentRefs"),
    "a long name": (['nameOverride="' + "a" * 41 + '"'], "41 characters"),
    "a name in capitals": (['nameOverride="Diptych"'], "small letters"),
    "a group called router": (['groups.router={"pool": "decode", "minReplicas": 1, "maxReplicas": 1}'], "taken"),
    "pods of a group that nobody describes": (
        ['cluster.decode.groups={"h200": {}}'], "set groups.decode to null",
    ),
    "a group without pods": (
        ['cluster.decode.groups={"decode": {}, "h200": {}}'], "cluster.decode.groups.h200 has no pods; add groups.h200",
    ),
    "more workers of a group than pods": (
        ['cluster.decode.groups={"decode": {"replicas": 9}}'], "cluster.decode.groups.decode.replicas is 9",
    ),
    "no pod of a group to surge into": (
        ['cluster.decode.groups={"decode": {"replicas": 8}}'], "cluster.decode.groups.decode.surge: 0",
    ),
    "ranks without a GPU each": (['cluster.decode.engine.tensor_parallel=2'], "cluster.decode.num_gpus is 1 and its"),
    "ranks of a group without a GPU each": (
        ['cluster.decode.groups={"decode": {"num_gpus": 2, "engine": {"tensor_parallel": 4}}}'],
        "cluster.decode.groups.decode.num_gpus is 2 and its engine.tensor_parallel is 4",
    ),
    "min above max": (['groups.decode.minReplicas=9'], "raise maxReplicas"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "word"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_cannot_be_meant_is_refused_with_its_cause(settings: list[str], word: str) -> None:
    done = chart.template(settings=settings)
    assert done.returncode != 0
    assert word in done.stderr


# Planted errors: what the checks above are worth.

Change = Callable[[dict[str, Any]], None]


def worker(service: dict[str, Any]) -> dict[str, Any]:
    return service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]


def container(service: dict[str, Any]) -> dict[str, Any]:
    return worker(service)["template"]["spec"]["containers"][0]


def head(service: dict[str, Any]) -> dict[str, Any]:
    return service["spec"]["rayClusterConfig"]["headGroupSpec"]


PLANTED: dict[str, tuple[Change, str]] = {
    "a misspelt field of the operator": (lambda s: worker(s).update(minReplica=1), "minReplica"),
    "a wrong type": (lambda s: worker(s).update(minReplicas="1"), "minReplicas"),
    "a number where Ray's version is text": (
        lambda s: s["spec"]["rayClusterConfig"].update(rayVersion=2.6), "rayVersion",
    ),
    "an unknown value": (lambda s: s["spec"]["upgradeStrategy"].update(type="Rolling"), "Rolling"),
    "a misspelt field of a pod": (lambda s: container(s).update(readynessProbe={}), "readynessProbe"),
    "a wrong type in a pod": (lambda s: container(s)["ports"][0].update(containerPort="8200"), "containerPort"),
    "a mount without a volume": (
        lambda s: container(s)["volumeMounts"].append({"name": "x", "mountPath": "/x"}), "no volume",
    ),
    "a probe of a port that is not there": (
        lambda s: container(s).update(readinessProbe={"httpGet": {"port": "web"}}), "has not",
    ),
    "a volume with two sources": (
        lambda s: worker(s)["template"]["spec"]["volumes"][0].update(hostPath={"path": "/"}), "must have one",
    ),
    "no probe of its own": (lambda s: container(s).pop("readinessProbe"), "never ready"),
    "no preStop hook": (lambda s: container(s).pop("lifecycle"), "no preStop hook"),
    "the samples' preStop hook": (
        lambda s: container(s).update(lifecycle={"preStop": {"exec": {"command": ["ray", "stop"]}}}), "drops",
    ),
    "labels as start parameters": (lambda s: worker(s)["rayStartParams"].update(labels="a=b"), "labels"),
    "resources in both places": (lambda s: worker(s)["rayStartParams"].update(resources="{}"), "both"),
    "a head without the port serve": (
        lambda s: head(s)["template"]["spec"]["containers"][0]["ports"].pop(), "called serve",
    ),
    "no bounds": (lambda s: worker(s).pop("maxReplicas"), "minReplicas <= replicas"),
    "no token": (lambda s: s["spec"]["rayClusterConfig"].pop("authOptions"), "run code"),
    "the operator's own variables": (
        lambda s: container(s)["env"].append({"name": "RAY_AUTH_MODE", "value": "token"}), "set by the operator",
    ),
    "a long name": (lambda s: s["metadata"].update(name="a" * 48), "47"),
    "redis settings for rocksdb": (
        lambda s: s["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"].update(redisAddress="r:1"), "no redis",
    ),
    "a restart policy beside the autoscaler": (
        lambda s: worker(s)["template"]["spec"].update(restartPolicy="Always"), "restartPolicy",
    ),
}  # fmt: skip


@functools.cache
def loaded(name: str) -> list[manifests.Object]:
    return manifests.load((chart.RENDERED / f"{name}.yaml").read_text())


def committed(name: str, kind: str) -> dict[str, Any]:
    """The first of its kind, to change as one likes."""
    return copy.deepcopy(next(thing for thing in loaded(name) if thing["kind"] == kind))


@pytest.mark.parametrize(("change", "word"), list(PLANTED.values()), ids=list(PLANTED))
def test_planted_errors_are_caught(change: Change, word: str) -> None:
    """Without it there are none: that is tested above."""
    service = committed("gpu-rdma", "RayService")
    change(service)
    found = manifests.problems(service)
    assert any(word in problem for problem in found), found


def test_planted_errors_in_other_kinds_are_caught() -> None:
    for kind, path, value in [
        ("Service", ("spec", "ports", 0, "port"), "http"),
        ("PodDisruptionBudget", ("spec", "minAvaliable"), 1),
        ("NetworkPolicy", ("spec", "ingres"), []),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "intervall"), "1s"),
    ]:
        thing = committed("gpu-tcp", kind)
        assert manifests.problems(thing) == []
        place: Any = thing
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        assert manifests.problems(thing), f"{kind}: {path}"


def test_the_crd_takes_every_rayservice_and_its_cel_rules_hold() -> None:
    services = [committed(path.stem, "RayService") for path in chart.VALUES if path.stem != "kind"]
    for service in services:
        assert manifests.crd_problems(service) == []
    planted = copy.deepcopy(services[0])
    planted["spec"]["rayClusterConfig"]["managedBy"] = "me"
    assert any("managedBy" in problem for problem in manifests.crd_problems(planted))
    planted = copy.deepcopy(services[0])
    worker(planted)["minReplica"] = 1
    assert any("minReplica" in problem for problem in manifests.crd_problems(planted))
    redis = committed("gpu-rdma", "RayService")
    before = copy.deepcopy(redis)
    redis["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["backend"] = "redis"
    assert any("immutable" in problem for problem in manifests.crd_problems(redis, before))


# What the objects mean to one another.


def all_committed() -> list[Any]:
    return [pytest.param(loaded(path.stem), id=path.stem) for path in sorted(chart.RENDERED.glob("*.yaml"))]


@pytest.mark.parametrize("rendered", all_committed())
def test_selectors_find_pods_and_named_ports_are_theirs(rendered: list[manifests.Object]) -> None:
    pods = list(itertools.chain.from_iterable(map(manifests.pod_templates, rendered)))
    by_kind = {
        kind: [thing for thing in rendered if thing["kind"] == kind] for kind in {thing["kind"] for thing in rendered}
    }
    for service in by_kind["Service"]:
        chosen = [pod for _, pod in pods if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
        assert chosen, service["metadata"]["name"]
        ports = {port["name"] for pod in chosen for port in pod["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in by_kind.get("PodDisruptionBudget", []):
        labels = budget["spec"]["selector"]["matchLabels"].items()
        assert any(labels <= pod["metadata"]["labels"].items() for _, pod in pods)
        assert set(budget["spec"]) & {"maxUnavailable"} == set(), "Kubernetes refuses it where the owner has no scale"
    accounts = {thing["metadata"]["name"] for thing in by_kind["ServiceAccount"]}
    maps = {thing["metadata"]["name"] for thing in by_kind.get("ConfigMap", [])}
    for name, pod in pods:
        assert pod["spec"].get("serviceAccountName") in accounts | ({None} if name == "head" else set())
        for volume in pod["spec"].get("volumes", []):
            assert volume.get("configMap", {}).get("name", "") in maps | {""}
            for source in volume.get("projected", {}).get("sources", []):
                assert source.get("configMap", {}).get("name", "") in maps | {""}


@pytest.mark.parametrize("rendered", all_committed())
def test_the_grace_period_outlasts_hold_and_drain(rendered: list[manifests.Object]) -> None:
    (config,) = [validate_settings(found, ClusterConfig, "the chart") for found in configurations(rendered)]
    for thing in rendered:
        for _, pod in manifests.pod_templates(thing):
            role = pod["metadata"]["labels"].get("diptych.dev/role")
            if role not in ("router", "prefill", "decode", "standby"):
                continue
            grace = pod["spec"]["terminationGracePeriodSeconds"]
            group = (
                pod["metadata"]["labels"]["diptych.dev/group"] if role != "router" and config.pools[role].groups else ""
            )
            drain = config.router.drain_s if role == "router" else config.worker_settings(role, group).worker.drain_s
            command = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            if thing["kind"] == "RayService":
                hold, timeout = (float(word.partition("=")[2]) for word in command[2:])
                assert timeout > drain
                assert grace > hold + timeout
            else:
                assert grace > float(command[1]) + drain + 10


@pytest.mark.parametrize("rendered", all_committed())
def test_pods_are_as_small_as_they_can_be(rendered: list[manifests.Object]) -> None:
    """Not root, a read-only root, no capability but what RDMA needs, no token of the API server."""
    for thing in rendered:
        for name, pod in manifests.pod_templates(thing):
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            if name != "head":  # whose autoscaler talks with the API server
                assert spec["automountServiceAccountToken"] is False
            for one in spec["containers"]:
                context = one["securityContext"]
                assert context["readOnlyRootFilesystem"] is True
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"]["drop"] == ["ALL"]
                assert set(context["capabilities"].get("add", [])) <= {"IPC_LOCK"}


@pytest.mark.parametrize("rendered", all_committed())
def test_why_a_container_ended_is_seen_in_its_pod(rendered: list[manifests.Object]) -> None:
    """`kubectl describe pod`: our own last words where the process is ours, else the end of the log."""
    for thing in rendered:
        for _, pod in manifests.pod_templates(thing):
            if pod["metadata"]["labels"].get("diptych.dev/role") in ("router", "prefill", "decode", "standby"):
                (container, *_) = pod["spec"]["containers"]
                assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
                words = {one["name"]: one.get("value") for one in container["env"]}.get(LAST_WORDS)
                assert words == (None if thing["kind"] == "RayService" else "/dev/termination-log")


def test_columns_for_kubectl_are_labels_of_every_pod() -> None:
    """KubeRay's own columns cannot be added to; `kubectl get pods -L` shows labels."""
    for path in chart.VALUES:
        for name, pod in itertools.chain.from_iterable(map(manifests.pod_templates, loaded(path.stem))):
            labels = pod["metadata"]["labels"]
            assert labels["app.kubernetes.io/name"] == "diptych"
            assert labels.get("diptych.dev/role"), name


def test_a_gang_is_asked_for_by_the_labels_that_the_operator_looks_for() -> None:
    """It copies the RayService's labels to its RayCluster, where its plugins for schedulers read them."""
    wanted = {"ray.io/gang-scheduling-enabled": "true", "kai.scheduler/queue": "team"}
    (service,) = [
        thing for thing in chart.render(settings=[f"ray.labels={json.dumps(wanted)}"]) if thing["kind"] == "RayService"
    ]
    assert wanted.items() <= service["metadata"]["labels"].items()
    # Such a scheduler places all pods or none, so a group must fit as it starts: one worker a pod.
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert group.get("numOfHosts", 1) == 1


@pytest.mark.parametrize("mode", ["FailOpen", "FailClose"])
def test_what_a_gateway_does_without_its_picker_is_a_value(mode: str) -> None:
    settings = {"enabled": True, "parentRefs": [{"name": "public"}],
                "inferencePool": {"enabled": True, "picker": "picker", "failureMode": mode}}  # fmt: skip
    (pool,) = [t for t in chart.render(settings=[f"gateway={json.dumps(settings)}"]) if t["kind"] == "InferencePool"]
    assert pool["spec"]["endpointPickerRef"]["failureMode"] == mode


@pytest.mark.parametrize("mode", ["ray", "deployments"])
def test_a_group_has_the_workers_that_cluster_yaml_says(mode: str) -> None:
    """Its own GPUs, drain time and settings; with Deployments each process is told which group it is of."""
    groups = {
        "decode": {"replicas": 3, "surge": 0},
        "big": {"num_gpus": 4, "engine": {"tensor_parallel": 4}, "worker": {"drain_s": 500}},
    }
    rendered = chart.render(
        settings=[
            f'mode="{mode}"',
            f"cluster.decode.groups={json.dumps(groups)}",
            'groups.big={"pool": "decode", "minReplicas": 0, "maxReplicas": 2}',
        ]
    )
    (config,) = [validate_settings(found, ClusterConfig, "the chart") for found in configurations(rendered)]
    assert (config.decode.replicas, config.group("decode", "big").num_gpus) == (4, 4)
    assert config.worker_settings("decode", "big").engine.tensor_parallel == 4
    found = [pod for thing in rendered for _, pod in manifests.pod_templates(thing)]
    pods = {pod["metadata"]["labels"].get("diptych.dev/group"): pod["spec"] for pod in found}
    for name, gpus in (("decode", "1"), ("big", "4"), ("prefill", "1")):
        container = pods[name]["containers"][0]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
        told = [word for word in container.get("args", []) if word.startswith("--group")]
        assert told == ([f"--group={name}"] if mode == "deployments" and name != "prefill" else [])
    assert pods["big"]["terminationGracePeriodSeconds"] - pods["decode"]["terminationGracePeriodSeconds"] == 380


def test_a_group_may_be_scaled_to_nothing() -> None:
    """By KEDA; under Ray by our policy, whose pods are the operator's autoscaler's."""
    keda = {"prefill": {"minReplicas": 0, "maxReplicas": 4, "triggers": [{"type": "cpu"}]}}
    rendered = chart.render(settings=['mode="deployments"', f"autoscaling.keda={json.dumps(keda)}"])
    (scaled,) = [thing for thing in rendered if thing["kind"] == "ScaledObject"]
    assert scaled["spec"]["minReplicaCount"] == 0
    (deployment,) = [t for t in rendered if t["metadata"]["name"] == "diptych-prefill" and t["kind"] == "Deployment"]
    assert "replicas" not in deployment["spec"], "or every `helm upgrade` would undo what was scaled"
    none = ["groups.prefill.minReplicas=0", "groups.decode.minReplicas=0"]
    rendered = chart.render(settings=[*none, 'cluster.scaling={"budget_gpus": 8, "idle_s": 600}'])
    (service,) = [thing for thing in rendered if thing["kind"] == "RayService"]
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert [groups[name]["minReplicas"] for name in ("router", "prefill", "decode")] == [2, 0, 0]


def test_secrets_are_named_and_never_held() -> None:
    for path in sorted(chart.RENDERED.glob("*.yaml")):
        assert not [thing for thing in manifests.load(path.read_text()) if thing["kind"] == "Secret"]
        assert "PRIVATE KEY" not in path.read_text()


def test_the_air_gapped_values_need_one_registry_alone() -> None:
    images = {
        one["image"]
        for thing in manifests.load((chart.RENDERED / "airgapped.yaml").read_text())
        for _, pod in manifests.pod_templates(thing)
        for one in pod["spec"]["containers"]
    }
    assert len(images) == 2
    assert all(image.startswith("registry.example.com/") for image in images)
    assert all(":" in image.rpartition("/")[2] for image in images)


@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_serve_takes_what_it_is_told() -> None:
    from ray.serve.schema import ServeDeploySchema

    for path in sorted(chart.RENDERED.glob("gpu-*.yaml")):
        told = yaml.safe_load(committed(path.stem, "RayService")["spec"]["serveConfigV2"])
        schema = ServeDeploySchema.model_validate(told)
        assert schema.proxy_location == "Disabled"
        (application,) = schema.applications
        assert (application.import_path, application.route_prefix) == ("deploy.app:build", None)


def test_pools_are_on_the_groups_that_offer_them() -> None:
    service = committed("gpu-rdma", "RayService")
    (config,) = [validate_settings(found, ClusterConfig, "the chart") for found in configurations([service])]
    offered: dict[str, int] = {}
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        (resource,) = group["resources"]
        offered[resource] = offered.get(resource, 0) + group["maxReplicas"]
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0")
        workers = next((one for one in config.groups if resource in one.resources), None)
        assert float(gpus) == (workers.num_gpus if workers else 0)
    homes = [one.home for one in config.groups if one.replicas]
    assert homes == ["prefill", "decode/decode-h100", "decode/decode-h200"]
    for one in config.groups:
        if one.replicas:
            assert list(one.resources) == [one.title]
            assert one.replicas + one.surge <= offered[one.title]
    assert list(config.ray.router_resources) == ["router"]
    assert json.dumps(config.model_dump(mode="json"))
