"""Every key of the Helm chart's values, and their JSON Schema: its own, and under `cluster` those of cluster.yaml.

What Kubernetes decides is taken out of `cluster`: whoever sets an address there is told so by `helm install`.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.config import ClusterConfig
from settings.security import ListenerLimits

# Kept by the chart, by where they are in ClusterConfig.
OF_THE_CHART = (
    "model",
    "security",
    "ray",
    "engine.model",
    "engine.served_model_name",
    "worker.worker_id",
    "worker.group",
    "worker.host",
    "worker.port",
    "worker.advertise_host",
    "worker.router_addresses",
    "router.model",
    "router.router_id",
    "router.replicas",
    "router.host",
    "router.grpc_port",
    "router.http_port",
    "router.internal_host",
    "router.internal_port",
    "telemetry.metrics_host",
    "telemetry.metrics_port",
    "telemetry.worker_metrics_port",
    "prefill.resources",
    "decode.resources",
    "standby.resources",
)
_OF_GROUPS = ("resources",)  # kept by the chart in the groups of a pool
_DRAFT = "http://json-schema.org/draft-07/schema#"  # what every Helm 3 and 4 understands

Port = Annotated[int, Field(ge=1, le=65535)]
Quantity = Annotated[str, Field(pattern=r"^[0-9.]+(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
Free = dict[str, Any]  # a part of the Kubernetes API, which checks it itself


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Image(_Section):
    repository: str
    tag: str = ""
    pullPolicy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pullSecrets: list[Free] = []


class SecretKey(_Section):
    secret: str = ""
    key: str = ""


class Model(_Section):
    path: str = Field(min_length=1, description='A directory, a hub id, or "embedded".')
    volume: Free = Field(default={}, description="A volume source with the weights, mounted at mountPath.")
    mountPath: str = Field(default="/models/served", pattern="^/")
    cache: Free = Field(default={}, description="A volume source for downloads and compiled kernels.")
    offline: bool = False
    hubToken: SecretKey = SecretKey()


class Ports(_Section):
    grpc: Port
    http: Port
    registry: Port
    worker: Port
    metrics: Port
    workerMetrics: Port


class Pod(_Section):
    """What a pod template may have beside what the chart puts there."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    resources: Free = {}
    nodeSelector: dict[str, str] = {}
    tolerations: list[Free] = []
    affinity: Free = {}
    topologySpreadConstraints: list[Free] = []
    priorityClassName: str = ""
    runtimeClassName: str = ""
    schedulerName: str = ""
    hostNetwork: bool = False
    dnsPolicy: str = ""
    securityContext: Free = {}
    env: list[Free] = []
    volumes: list[Free] = []
    volumeMounts: list[Free] = []
    initContainers: list[Free] = []
    extraContainers: list[Free] = []


class Router(_Section):
    replicas: int = Field(ge=1, le=64)
    pod: Pod = Pod()


class Group(_Section):
    """Pods that serve one pool, one worker each."""

    pool: Literal["prefill", "decode", "standby"]
    replicas: int | None = Field(default=None, ge=0, description="Pods at first; a pool's only group follows the pool.")
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    pod: Pod = Pod()


class Gpu(_Section):
    resource: str = Field(min_length=1)


class Rdma(_Section):
    enabled: bool
    resource: str = Field(min_length=1, description="The device plugin's name of it.")
    count: int = Field(default=1, ge=1)
    hugepages: str = Field(default="", pattern=r"^([0-9]+(Mi|Gi))?$")


class Drain(_Section):
    holdSeconds: int = Field(ge=0, description="How long a leaving router goes on taking requests.")
    slackSeconds: int = Field(ge=15, description="Between the longest drain and the kill.")


class ProbeTimes(_Section):
    periodSeconds: int = Field(ge=1)
    timeoutSeconds: int = Field(ge=1)
    failureThreshold: int = Field(ge=1)


class Probes(_Section):
    startSeconds: int = Field(ge=30, description="The longest load of a model.")
    worker: ProbeTimes
    router: ProbeTimes


class Service(_Section):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    annotations: dict[str, str] = {}


class Head(_Section):
    pod: Pod = Pod()


class Autoscaler(_Section):
    enabled: bool
    idleTimeoutSeconds: int = Field(ge=1)
    resources: Free = {}


class Gcs(_Section):
    faultTolerance: Literal["none", "rocksdb", "redis"]
    storage: Free = {}
    redisAddress: str = ""
    redisPassword: SecretKey = SecretKey()


class Ray(_Section):
    version: str = Field(pattern=r"^\d+\.\d+\.\d+$", description="A string: quote it.")
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    upgradeStrategy: Literal["NewCluster", "None"]
    deletionDelaySeconds: int = Field(ge=0)
    head: Head = Head()
    autoscaler: Autoscaler
    gcs: Gcs


class Secrets(_Section):
    router: str = Field(min_length=1)
    worker: str = Field(min_length=1)
    clusterSecret: str = Field(min_length=1)
    apiKeys: str = ""


class CertManager(_Section):
    enabled: bool
    publicIssuer: Free = {}
    publicNames: list[str] = []
    duration: str = "2160h"
    renewBefore: str = "720h"


class Security(_Section):
    insecureOk: bool
    secrets: Secrets
    clientCertificates: bool = False
    limits: ListenerLimits = ListenerLimits()
    certManager: CertManager


class NetworkPolicy(_Section):
    enabled: bool
    operator: Free = {}
    clients: list[Free] = []
    monitoring: list[Free] = []


class Enabled(_Section):
    enabled: bool


class ServiceAccount(_Section):
    create: bool
    name: str = ""
    annotations: dict[str, str] = {}


class PodMonitor(Enabled):
    interval: str = "10s"
    labels: dict[str, str] = {}


class Labelled(Enabled):
    labels: dict[str, str] = {}


class Collector(Enabled):
    image: str
    exportTo: str
    resources: Free = {}


class Monitoring(_Section):
    podMonitor: PodMonitor
    prometheusRule: Labelled
    dashboards: Labelled
    collector: Collector


class InferencePool(Enabled):
    picker: str = ""
    failureMode: Literal["FailOpen", "FailClose"] = Field(
        default="FailOpen", description="What a gateway does without its picker: any router, or none."
    )


class Gateway(Enabled):
    parentRefs: list[Free] = []
    hostnames: list[str] = []
    grpc: bool = True
    http: bool = True
    timeout: str = Field(default="", pattern=r"^(([0-9]{1,5}(h|m|s|ms)){1,4})?$")
    inferencePool: InferencePool


class Hpa(_Section):
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    metrics: list[Free] = []
    behavior: Free = {}


class Keda(_Section):
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    triggers: list[Free] = Field(min_length=1)


class ByOthers(_Section):
    hpa: dict[str, Hpa] = {}
    keda: dict[str, Keda] = {}


class ChartValues(_Section):
    nameOverride: str = ""
    image: Image
    mode: Literal["ray", "deployments"]
    model: Model
    cluster: Free
    ports: Ports
    router: Router
    groups: dict[str, Group] = Field(min_length=1)
    pod: Pod = Pod()
    gpu: Gpu
    rdma: Rdma
    sharedMemory: Quantity
    drain: Drain
    probes: Probes
    service: Service
    ray: Ray
    security: Security
    networkPolicy: NetworkPolicy
    podDisruptionBudget: Enabled
    serviceAccount: ServiceAccount
    monitoring: Monitoring
    gateway: Gateway
    autoscaling: ByOthers


def schema() -> dict[str, Any]:
    """values.schema.json. Nothing is required: values.yaml has a default for every key."""
    values = ChartValues.model_json_schema(ref_template="#/definitions/{model}")
    cluster = ClusterConfig.model_json_schema(ref_template="#/definitions/{model}")
    definitions = {**cluster.pop("$defs"), **values.pop("$defs")}
    shared = set(ClusterConfig.model_json_schema()["$defs"]) & set(ChartValues.model_json_schema()["$defs"])
    assert shared <= {"ListenerLimits"}, f"two classes of one name: {shared}"
    for path in OF_THE_CHART:
        *sections, key = path.split(".")
        owner = cluster
        for section in sections:
            owner = definitions[owner["properties"][section]["$ref"].rsplit("/", 1)[-1]]
        owner["properties"].pop(key, None)  # a class that several sections have was relieved of it before
    _accept_numbers_in_words(definitions["EngineConfig"])
    for key, section in (("engine", "EngineConfig"), ("worker", "WorkerConfig")):
        for owner in ("PoolConfig", "GroupConfig"):
            definitions[owner]["properties"][key] = {"$ref": f"#/definitions/{section}"}
    for key in _OF_GROUPS:
        definitions["GroupConfig"]["properties"].pop(key)
    values["properties"]["cluster"] = {k: v for k, v in cluster.items() if k not in ("title", "description")}
    found = {"$schema": _DRAFT, **values, "definitions": dict(sorted(definitions.items()))}
    return _plain(_used_alone(found))


def _accept_numbers_in_words(engine: dict[str, Any]) -> None:
    """As the settings do: YAML takes on and off for booleans, and a processor for a number."""
    for key, also in (("async_scheduling", {"type": "boolean"}), ("pin_threads", {"type": ["integer", "boolean"]})):
        field = engine["properties"][key]
        kept = {k: field.pop(k) for k in ("enum", "pattern", "type") if k in field}
        field["anyOf"] = [kept, also]


def _used_alone(found: dict[str, Any]) -> dict[str, Any]:
    """Without definitions that nothing refers to any more."""
    used: set[str] = set()

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            name = str(part.get("$ref", "")).rsplit("/", 1)[-1]
            if name and name not in used:
                used.add(name)
                walk(found["definitions"][name])
            for key, below in part.items():
                if key != "definitions":
                    walk(below)
        elif isinstance(part, list):
            for below in part:
                walk(below)

    walk(found)
    return {**found, "definitions": {name: d for name, d in found["definitions"].items() if name in used}}


def _plain(part: Any) -> Any:
    """Without what says nothing to Helm: titles, what is required, and defaults that values.yaml has."""
    if isinstance(part, list):
        return [_plain(below) for below in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return {"$ref": part["$ref"]}  # draft 7 ignores what stands beside it
    kept = {}
    for key, below in part.items():
        if key in ("properties", "definitions"):
            kept[key] = {name: _plain(field) for name, field in below.items()}
        elif key not in ("title", "required", "default"):
            kept[key] = _plain(below)
    return kept


def cluster_of(values: dict[str, Any]) -> dict[str, Any]:
    """The section `cluster`, with `model`, as something that ClusterConfig takes."""
    cluster = {**copy.deepcopy(values["cluster"]), "model": values["model"]["path"]}
    for role in ("prefill", "decode", "standby"):
        if cluster.get(role, {}).get("groups"):
            cluster[role].pop("replicas", None)  # a default of the chart; there, each group has its own
    return cluster
