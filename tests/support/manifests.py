"""Rendered objects, checked as an API server and KubeRay's operator would: `problems` of each, empty if it is good.

core kinds           Kubernetes' own JSON Schemas, strict: an unknown field is a problem
RayService           our own list of its fields, the operator's rules, each pod template as a Pod;
                     and its CRD with defaults and CEL where $KUBERAY_CRDS names it
other custom kinds   our own list of their fields
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

from tests.support import kube_tools

Object = dict[str, Any]

ANY: Object = {}  # what is checked elsewhere, or free
TEXT = {"type": "string"}
NUMBER = {"type": "integer"}
BOOL = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def fields(**known: Any) -> Object:
    return {"type": "object", "additionalProperties": False, "properties": known}


def many(item: Any) -> Object:
    return {"type": "array", "items": item}


_META = {"apiVersion": TEXT, "kind": TEXT, "metadata": ANY}
_REFERENCE = fields(group=TEXT, kind=TEXT, name=TEXT, namespace=TEXT, port=NUMBER, sectionName=TEXT)
_TIME = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_KEY = fields(name=TEXT, key=TEXT)
_GROUP = {
    "groupName": TEXT, "replicas": NUMBER, "minReplicas": NUMBER, "maxReplicas": NUMBER, "numOfHosts": NUMBER,
    "rayStartParams": TEXTS, "resources": TEXTS, "labels": TEXTS, "template": ANY, "idleTimeoutSeconds": NUMBER,
}  # fmt: skip
_RAY_CLUSTER = fields(
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=BOOL,
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]}, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=NUMBER, imagePullPolicy=TEXT, resources=ANY, securityContext=ANY,
    ),
    gcsFaultToleranceOptions=fields(
        backend={"enum": ["redis", "rocksdb"]}, redisAddress=TEXT, redisPassword=fields(value=TEXT, valueFrom=ANY),
        storage=fields(size=TEXT, storageClassName=TEXT, claimName=TEXT, accessModes=many(TEXT), deletionPolicy=TEXT),
    ),
    headGroupSpec=fields(rayStartParams=TEXTS, template=ANY, labels=TEXTS, resources=TEXTS, serviceType=TEXT),
    workerGroupSpecs=many(fields(**_GROUP)),
)  # fmt: skip
_CUSTOM = {
    "RayService": fields(
        **_META,
        spec=fields(
            serveConfigV2=TEXT, rayClusterConfig=_RAY_CLUSTER, excludeHeadPodFromServeSvc=BOOL,
            rayClusterDeletionDelaySeconds=NUMBER,
            upgradeStrategy=fields(type={"enum": ["NewCluster", "None", "NewClusterWithIncrementalUpgrade"]}),
        ),
    ),
    "PodMonitor": fields(
        **_META,
        spec=fields(
            selector=ANY,
            podMetricsEndpoints=many(
                fields(port=TEXT, path=TEXT, interval=TEXT, scheme={"enum": ["http", "https"]}, relabelings=ANY,
                       tlsConfig=fields(ca=fields(secret=_KEY), cert=fields(secret=_KEY), keySecret=_KEY,
                                        insecureSkipVerify=BOOL, serverName=TEXT))
            ),
        ),
    ),
    "PrometheusRule": fields(
        **_META,
        spec=fields(groups=many(fields(name=TEXT, rules=many(fields(
            **{"alert": TEXT, "expr": TEXT, "for": TEXT, "labels": TEXTS, "annotations": TEXTS}))))),
    ),
    "GRPCRoute": fields(
        **_META,
        spec=fields(parentRefs=many(_REFERENCE), hostnames=many(TEXT),
                    rules=many(fields(matches=many(fields(method=fields(service=TEXT, method=TEXT))),
                                      backendRefs=many(_REFERENCE)))),
    ),
    "HTTPRoute": fields(
        **_META,
        spec=fields(parentRefs=many(_REFERENCE), hostnames=many(TEXT),
                    rules=many(fields(matches=ANY, backendRefs=many(_REFERENCE),
                                      timeouts=fields(request=_TIME, backendRequest=_TIME)))),
    ),
    "InferencePool": fields(
        **_META,
        spec=fields(selector=fields(matchLabels=TEXTS), targetPorts=many(fields(number=NUMBER)),
                    endpointPickerRef=fields(name=TEXT, kind=TEXT, group=TEXT, port=fields(number=NUMBER),
                                             failureMode={"enum": ["FailOpen", "FailClose"]})),
    ),
    "Issuer": fields(**_META, spec=fields(selfSigned=fields(), ca=fields(secretName=TEXT))),
    "Certificate": fields(
        **_META,
        spec=fields(isCA=BOOL, commonName=TEXT, secretName=TEXT, duration=TEXT, renewBefore=TEXT, dnsNames=many(TEXT),
                    privateKey=fields(algorithm=TEXT, size=NUMBER, rotationPolicy={"enum": ["Always", "Never"]}),
                    usages=many(TEXT), issuerRef=fields(kind=TEXT, name=TEXT, group=TEXT)),
    ),
    "ScaledObject": fields(
        **_META,
        spec=fields(scaleTargetRef=fields(name=TEXT), minReplicaCount=NUMBER, maxReplicaCount=NUMBER,
                    triggers=many(fields(type=TEXT, metadata=TEXTS, name=TEXT, metricType=TEXT,
                                         authenticationRef=ANY))),
    ),
}  # fmt: skip


def problems(thing: Object) -> list[str]:
    """Each with the path that it is at."""
    kind = thing["kind"]
    if kind in _CUSTOM:
        found = _errors(jsonschema.Draft202012Validator(_CUSTOM[kind]), thing)
        if kind == "RayService":
            found += list(operator_rules(thing))
            for name, template in pod_templates(thing):
                found += [f"{name}: {problem}" for problem in of_pod(template)]
    else:
        found = _errors(_core(kind, thing["apiVersion"]), _without_nulls(thing))
        for name, template in pod_templates(thing):
            found += [f"{name}: {problem}" for problem in _pod_rules(template)]
    return found


def of_pod(template: Object) -> list[str]:
    return [*_pod_errors(json.dumps(_without_nulls(template))), *_pod_rules(template)]


@functools.cache
def _pod_errors(template: str) -> list[str]:
    """Most values leave most pods as they are."""
    return _errors(_core("Pod", "v1"), {"apiVersion": "v1", "kind": "Pod", **json.loads(template)})


def pod_templates(thing: Object) -> Iterator[tuple[str, Object]]:
    if thing["kind"] == "RayService":
        cluster = thing["spec"]["rayClusterConfig"]
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]
    elif thing["kind"] == "Deployment":
        yield thing["metadata"]["name"], thing["spec"]["template"]
    elif thing["kind"] == "Pod":
        yield thing["metadata"]["name"], thing


def _pod_rules(pod: Object) -> Iterator[str]:
    """What the API server checks beyond types."""
    spec = pod["spec"]
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    if len(volumes) != len(set(volumes)):
        yield f"two volumes of one name: {sorted(volumes)}"
    for volume in spec.get("volumes", []):
        if len(volume) != 2:
            yield f"volume {volume['name']} has {len(volume) - 1} sources, and must have one"
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        mounts = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        if len(mounts) != len(set(mounts)):
            yield f"two mounts at one path: {sorted(mounts)}"
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{container['name']} mounts {mount['name']}, which is no volume of the pod"
        ports = [port.get("name") for port in container.get("ports", [])]
        if len(ports) != len(set(ports)):
            yield f"two ports of one name: {ports}"
        variables = [variable["name"] for variable in container.get("env", [])]
        if len(variables) != len(set(variables)):
            yield f"a variable is set twice: {variables}"
        for name in ("readinessProbe", "livenessProbe", "startupProbe"):
            probe = container.get(name, {})
            asked = [kind for kind in ("grpc", "httpGet", "tcpSocket", "exec") if kind in probe]
            if probe and len(asked) != 1:
                yield f"{name} has {asked} to ask, and must have one"
            port = probe.get("httpGet", {}).get("port")
            if isinstance(port, str) and port not in ports:
                yield f"{name} asks the port {port}, which the container has not"
        requests = container.get("resources", {}).get("requests", {})
        limits = container.get("resources", {}).get("limits", {})
        for resource in {*requests, *limits}:
            if "/" in resource and requests.get(resource, limits.get(resource)) != limits.get(resource):
                yield f"{resource}: request and limit must be equal"
            if resource.startswith("hugepages-") and requests.get(resource) != limits.get(resource):
                yield f"{resource}: request and limit must be equal"


def operator_rules(service: Object) -> Iterator[str]:
    """What KubeRay 1.7 refuses, or would do something else with than one thinks."""
    name, spec = service["metadata"]["name"], service["spec"]
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the name {name} is longer than 47 characters, or no label"
    cluster = spec["rayClusterConfig"]
    scaled = cluster.get("enableInTreeAutoscaling", False)
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches Ray's ports could run code"
    elif tuple(map(int, str(cluster.get("rayVersion", "0")).split("."))) < (2, 52, 0):
        yield "token authentication needs rayVersion 2.52.0 or later"
    if "autoscalerOptions" in cluster and not scaled:
        yield "autoscalerOptions without enableInTreeAutoscaling"
    head = cluster["headGroupSpec"]
    named = [port["name"] for port in head["template"]["spec"]["containers"][0].get("ports", [])]
    if named and not any(port == "serve" or port.startswith("serve-") for port in named):
        yield "the head names its ports, and none is called serve: the operator fails to make the Service it insists on"
    if named and not {"gcs-server", "dashboard"} <= set(named):
        yield "the head names its ports, but not gcs-server and dashboard: its Service would lack them"
    for group in [{"groupName": "head", **head}, *cluster["workerGroupSpecs"]]:
        yield from _group_rules(group, scaled, is_head=group["groupName"] == "head")
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    if len(names) != len(set(names)):
        yield f"two groups of one name: {names}"
    backend = cluster.get("gcsFaultToleranceOptions", {})
    if backend.get("backend") == "rocksdb" and {"redisAddress", "redisPassword"} & set(backend):
        yield "gcsFaultToleranceOptions: rocksdb takes no redis settings"
    if backend.get("backend") == "redis" and "storage" in backend:
        yield "gcsFaultToleranceOptions: redis takes no storage"


def _group_rules(group: Object, scaled: bool, is_head: bool) -> Iterator[str]:
    name, pod = group["groupName"], group["template"]["spec"]
    params = group.get("rayStartParams", {})
    if {"num-cpus", "num-gpus", "memory", "resources"} & set(params) and group.get("resources"):
        yield f"{name}: resources both in rayStartParams and in resources"
    if "labels" in params:
        yield f"{name}: labels belong in the group's labels, not in rayStartParams"
    counts = [group.get(key) for key in ("minReplicas", "replicas", "maxReplicas")]
    if not is_head and not (all(isinstance(count, int) for count in counts) and counts == sorted(counts)):
        yield f"{name}: minReplicas <= replicas <= maxReplicas must all be there and hold"
    container = pod["containers"][0]
    variables = {variable["name"] for variable in container.get("env", [])}
    if taken := variables & {
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_ADDRESS",
        "RAY_enable_autoscaler_v2",
        "RAY_CLUSTER_NAME",
    }:
        yield f"{name}: {sorted(taken)} are set by the operator"
    if scaled and pod.get("restartPolicy", "Never") != "Never":
        yield f"{name}: restartPolicy must be Never or unset with autoscaler v2"
    if not is_head and "readinessProbe" not in container:
        yield f"{name}: without a probe of its own a worker gets one that asks a Serve proxy, and is never ready"
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if "ray stop" in " ".join(hook):
        yield f"{name}: a preStop `ray stop` drops what is under way"
    if not is_head and "router" not in group.get("resources", {}) and "lifecycle" not in container:
        yield f"{name}: no preStop hook: what is under way ends with the pod"


# With KubeRay's CRD.


def crd_problems(service: Object, old: Object | None = None) -> list[str]:
    """Types, unknown fields and CEL rules of the CRD, with its defaults filled in. Needs $KUBERAY_CRDS."""
    schema = kube_tools.kuberay_crd("rayservices")
    strict = _closed(schema)
    found = _errors(jsonschema.Draft202012Validator(strict), service)
    return found + list(_cel(schema, service, old, ""))


def _closed(schema: Object) -> Object:
    """Unknown fields are errors, as for strict validation; OpenAPI's own words become JSON Schema's."""
    made: Object = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: _closed(below) for name, below in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            made[key] = _closed(value)
        elif key in ("anyOf", "allOf", "oneOf") or key in (
            "type",
            "enum",
            "pattern",
            "minimum",
            "maximum",
            "required",
            "minItems",
            "maxItems",
            "maxLength",
        ):
            made[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    free = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in made and not free and "additionalProperties" not in made and schema.get("type") == "object":
        made["additionalProperties"] = False
    if made.get("properties") and "metadata" in made["properties"] and "apiVersion" in made["properties"]:
        made["properties"]["metadata"] = {"type": "object"}
    return made


def _cel(schema: Object, value: Any, old: Any, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in rule["rule"] and old is None:
            continue
        said = kube_tools.cel().evaluate(rule["rule"], {"self": value, "oldSelf": old})
        if said is not True:
            yield f"{path}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, below in schema.get("properties", {}).items():
            if name in value:
                before = old.get(name) if isinstance(old, dict) else None
                yield from _cel(below, value[name], before, f"{path}.{name}")
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from _cel(schema["items"], item, None, f"{path}[{index}]")


# Kubernetes' own kinds.


@functools.cache
def _definitions() -> Registry:
    resource = Resource.from_contents(kube_tools.read_json(kube_tools.core_schemas() / "_definitions.json"))
    return Registry().with_resource("_definitions.json", resource)


@functools.cache
def _core(kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    version = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = kube_tools.read_json(kube_tools.core_schemas() / f"{kind.lower()}-{version}.json")
    return jsonschema.Draft202012Validator(schema, registry=_definitions())


def _errors(validator: Any, thing: Any) -> list[str]:
    return [f"{error.json_path.removeprefix('$.')}: {error.message[:300]}" for error in validator.iter_errors(thing)]


def _without_nulls(thing: Any) -> Any:
    if isinstance(thing, dict):
        return {key: _without_nulls(value) for key, value in thing.items() if value is not None}
    return [_without_nulls(item) for item in thing] if isinstance(thing, list) else thing


def load(text: str) -> list[Object]:
    return [thing for thing in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if thing]
