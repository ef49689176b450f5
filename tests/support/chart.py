"""Renders the chart. `python -m tests.support.chart` writes deploy/chart/rendered anew (`make chart`)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support import kube_tools, manifests

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "chart"
RENDERED = CHART / "rendered"
VALUES = sorted((CHART / "values").glob("*.yaml"))
# What else may be asked of it, by `--set-json`.
MATRIX = {
    "default": (),
    "insecure": ('security={"insecureOk": true}',),
    "without autoscaler": (
        'ray.autoscaler.enabled=false',
        'cluster.prefill={"replicas": 1, "surge": 0}',
        'cluster.decode={"replicas": 2, "surge": 0}',
    ),
    "redis": (
        'ray.gcs={"faultTolerance": "redis", "redisAddress": "redis:6379", '
        '"redisPassword": {"secret": "redis", "key": "password"}}',
    ),
    "standbys": (
        'cluster.standby={"replicas": 2, "num_gpus": 1}',
        'groups.spare={"pool": "standby", "minReplicas": 0, "maxReplicas": 3}',
    ),
    "clients with certificates": ('security={"clientCertificates": true, "secrets": {"apiKeys": ""}}',),
    "a gateway and a picker": (
        'gateway={"enabled": true, "parentRefs": [{"name": "public"}], '
        '"inferencePool": {"enabled": true, "picker": "picker"}}',
    ),
    "everything off": (
        'networkPolicy.enabled=false', 'podDisruptionBudget.enabled=false',
        'serviceAccount={"create": false, "name": "x"}',
    ),
    "a hub id": ('model={"path": "org/model@main", "hubToken": {"secret": "hub", "key": "token"}}',),
    "limits": ('security.limits={"max_connections": 100}',),
    "hpa": (
        'mode="deployments"',
        'autoscaling.hpa={"decode": {"minReplicas": 1, "maxReplicas": 8, "metrics": [{"type": "Pods", "pods": '
        '{"metric": {"name": "diptych_sequences"}, "target": {"type": "AverageValue", "averageValue": "32"}}}]}}',
    ),
    "keda": (
        'mode="deployments"',
        'autoscaling.keda={"decode": {"minReplicas": 1, "maxReplicas": 8, "triggers": [{"type": "prometheus", '
        '"metadata": {"serverAddress": "http://prometheus:9090", "query": "1", "threshold": "1"}}]}}',
    ),
    "pods of every kind": (
        'pod={"labels": {"team": "a"}, "annotations": {"a": "b"}, "priorityClassName": "high", "schedulerName": '
        '"volcano", "runtimeClassName": "nvidia", "env": [{"name": "A", "value": "b"}], "volumes": [{"name": "more", '
        '"emptyDir": {}}], "volumeMounts": [{"name": "more", "mountPath": "/more"}]}',
    ),
}  # fmt: skip


def template(*values: Path, settings: Sequence[str] = (), name: str = "diptych") -> subprocess.CompletedProcess[str]:
    files = [argument for path in values for argument in ("--values", str(path))]
    more = [argument for setting in settings for argument in ("--set-json", setting)]
    command = [kube_tools.helm(), "template", name, str(CHART), "--namespace", "diptych", *files, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    done.stdout = re.sub(r"^# Source: .*\n", "", done.stdout, flags=re.MULTILINE)
    return done


def render(*values: Path, settings: Sequence[str] = ()) -> list[manifests.Object]:
    done = template(*values, settings=settings)
    assert done.returncode == 0, done.stderr
    return manifests.load(done.stdout)


def main() -> None:
    RENDERED.mkdir(exist_ok=True)
    for path in VALUES:
        done = template(path)
        if done.returncode != 0:
            raise SystemExit(f"{path.name}: {done.stderr}")
        (RENDERED / path.name).write_text(done.stdout)
        print(RENDERED / path.name)


if __name__ == "__main__":
    main()
