"""The chart before a real API server: what it refuses, what it makes of our objects, install, upgrade, uninstall.

Nothing runs there: it shows that every object is one that Kubernetes takes, not that pods start.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import chart, manifests
from tests.support.api_server import ApiServer, crds

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    server = ApiServer(tmp_path_factory.mktemp("api"))
    try:
        for crd in crds():
            if crd["spec"]["group"] in GROUPS:
                server.define(crd)
        done = server.kubectl("create", "priorityclass", "serving", "--value=1000")  # gpu-rdma.yaml's
        assert done.returncode == 0, done.stderr
        yield server
    finally:
        server.close()


# Of all that the chart can make.
GROUPS = (
    "ray.io", "monitoring.coreos.com", "gateway.networking.k8s.io", "inference.networking.k8s.io", "cert-manager.io",
    "keda.sh",
)  # fmt: skip


def known(api: ApiServer, things: list[manifests.Object]) -> None:
    """Skips the test where a kind's CRD was not given."""
    served = set(api.kubectl("api-versions").stdout.split())
    if missing := {thing["apiVersion"] for thing in things} - served:
        pytest.skip(f"DIPTYCH_TEST_CRDS has no CRD of {', '.join(sorted(missing))}")


def namespace(api: ApiServer, name: str, things: list[manifests.Object]) -> str:
    """As strict about pods as what goes there allows: RDMA's IPC_LOCK needs `privileged`."""
    level = "privileged" if "IPC_LOCK" in json.dumps(things) else "restricted"
    made = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": level}},
    }
    done = api.kubectl("apply", "-f", "-", given=yaml.safe_dump(made))
    assert done.returncode == 0, done.stderr
    return name


def taken(api: ApiServer, things: list[manifests.Object], place: str) -> str:
    """What the server says against them."""
    done = api.kubectl(
        "apply", "--server-side", "--dry-run=server", "--validate=strict", "-n", place, "-f", "-",
        given=yaml.safe_dump_all(things),
    )  # fmt: skip
    return "" if done.returncode == 0 and "Warning" not in done.stderr else done.stderr


def pods(things: list[manifests.Object]) -> list[manifests.Object]:
    found = []
    for number, (_, template) in enumerate(itertools.chain.from_iterable(map(manifests.pod_templates, things))):
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        pod["metadata"] = {**pod.get("metadata", {}), "name": f"pod-{number}"}
        found.append(pod)
    return found


@pytest.mark.parametrize("path", chart.VALUES, ids=lambda path: path.stem)
def test_it_is_installed_upgraded_and_removed(api: ApiServer, path: Path) -> None:
    things = chart.render(path)
    known(api, things)
    place = namespace(api, f"whole-{path.stem}", things)
    given = [str(chart.CHART), "-n", place, "-f", str(path)]

    done = api.helm("install", "diptych", *given)
    assert done.returncode == 0, done.stderr
    assert "unknown field" not in done.stderr
    first = ours(api, place, things)
    assert set(first) == {
        name(thing) for thing in things if "helm.sh/hook" not in thing["metadata"].get("annotations", {})
    }
    for thing in things:
        if name(thing) in first:
            assert missing(thing.get("spec", {}), first[name(thing)].get("spec", {})) == []

    assert api.helm("upgrade", "diptych", *given).returncode == 0
    assert generations(ours(api, place, things)) == generations(first), "an upgrade without a change changes nothing"

    done = api.helm("upgrade", "diptych", *given, "--set-json", "cluster.router.max_backlog_s=31")
    assert done.returncode == 0, done.stderr
    after = generations(ours(api, place, things))
    changed = {kind for (kind, one), number in after.items() if number != generations(first)[(kind, one)]}
    assert changed <= {"RayService", "Deployment", "ConfigMap"}
    assert "ConfigMap" in json.dumps([kind for kind, _ in after]) or changed

    done = api.helm("uninstall", "diptych", "-n", place)
    assert done.returncode == 0, done.stderr
    assert {key: thing for key, thing in ours(api, place, things).items() if not leaving(thing)} == {}


def name(thing: manifests.Object) -> tuple[str, str]:
    return thing["kind"], thing["metadata"]["name"]


def ours(api: ApiServer, place: str, things: list[manifests.Object]) -> dict[tuple[str, str], manifests.Object]:
    kinds = sorted({resource(thing) for thing in things})
    done = api.kubectl("get", ",".join(kinds), "-n", place, "-l", "app.kubernetes.io/instance=diptych", "-o", "json")
    assert done.returncode == 0, done.stderr
    return {name(thing): thing for thing in json.loads(done.stdout)["items"]}


def resource(thing: manifests.Object) -> str:
    group = thing["apiVersion"].rpartition("/")[0]
    return f"{thing['kind']}.{thing['apiVersion'].rpartition('/')[2]}.{group}" if group else thing["kind"]


def generations(things: dict[tuple[str, str], manifests.Object]) -> dict[tuple[str, str], Any]:
    return {key: thing["metadata"].get("generation") for key, thing in things.items()}


def leaving(thing: manifests.Object) -> bool:
    """Controllers end such: none runs here."""
    return "deletionTimestamp" in thing["metadata"]


def missing(asked: Any, stored: Any, path: str = "spec") -> list[str]:
    """What was asked for and is not there. Values that the server writes otherwise (quantities, times) are its own."""
    if isinstance(asked, dict):
        if not isinstance(stored, dict):
            return [path]
        below = [missing(value, stored.get(key), f"{path}.{key}") for key, value in asked.items() if value is not None]
        return list(itertools.chain.from_iterable(below))
    if isinstance(asked, list):
        if not isinstance(stored, list) or len(asked) != len(stored):
            return [path]
        pairs = enumerate(zip(asked, stored, strict=True))
        return [found for number, (one, other) in pairs for found in missing(one, other, f"{path}[{number}]")]
    return [path] if stored is None and asked not in ("", 0, False) else []


@pytest.mark.parametrize("settings", list(chart.MATRIX.values()), ids=list(chart.MATRIX))
def test_every_object_is_taken(api: ApiServer, settings: tuple[str, ...]) -> None:
    things = chart.render(settings=settings)
    known(api, things)
    assert taken(api, things, namespace(api, "matrix", things)) == ""


@pytest.mark.parametrize("path", chart.VALUES, ids=lambda path: path.stem)
def test_every_pod_is_admitted_where_pods_must_be_restricted(api: ApiServer, path: Path) -> None:
    things = chart.render(path)
    place = namespace(api, f"pods-{path.stem}", things)
    assert pods(things)
    assert taken(api, pods(things), place) == ""


Change = Callable[[dict[str, Any]], None]


def worker(service: dict[str, Any]) -> dict[str, Any]:
    return service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]


PLANTED: dict[str, tuple[str, Change, str]] = {
    "a misspelt field": ("RayService", lambda s: worker(s).update(minReplica=1), "minReplica"),
    "a wrong type": ("RayService", lambda s: worker(s).update(minReplicas="one"), "minReplicas"),
    "a misspelt field of a pod in it": (
        "RayService", lambda s: worker(s)["template"]["spec"]["containers"][0].update(readynessProbe={}),
        "readynessProbe",
    ),
    "a rule of the CRD": ("RayService", lambda s: s["spec"]["rayClusterConfig"].update(managedBy="me"), "managedBy"),
    "a port as text": ("Service", lambda s: s["spec"]["ports"][0].update(port="http"), "port"),
    "a budget that says both": (
        "PodDisruptionBudget", lambda s: s["spec"].update(minAvailable=1, maxUnavailable=1), "maxUnavailable",
    ),
    "an account that is none": ("ServiceAccount", lambda s: s["metadata"].update(name="A_B"), "A_B"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "word"), list(PLANTED.values()), ids=list(PLANTED))
def test_planted_errors_are_refused(api: ApiServer, kind: str, change: Change, word: str) -> None:
    things = [
        thing for thing in manifests.load((chart.RENDERED / "gpu-rdma.yaml").read_text()) if thing["kind"] == kind
    ]
    known(api, things)
    place = namespace(api, "planted", things)
    assert taken(api, things[:1], place) == ""
    change(things[0])
    assert word in taken(api, things[:1], place)


def test_a_pod_that_is_not_restricted_is_refused(api: ApiServer) -> None:
    things = chart.render(chart.CHART / "values" / "kind.yaml")
    place = namespace(api, "unrestricted", things)
    (first, *_) = pods(things)
    first["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    assert "allowPrivilegeEscalation" in taken(api, [first], place)
