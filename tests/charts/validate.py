"""Checks that hold for every object that the chart renders, whatever the values.

``problems`` runs them all: Kubernetes' own schemas, strictly; names; references between the objects; the restricted Pod
Security Standard; probes, grace periods and resources. Secrets, claims and service accounts of the user's are named in
``existing``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import jsonschema
from referencing import Registry, Resource

from tests.charts.fake_kubernetes import Object

# The oldest that the chart allows, one between, and the newest that the schemas' package knows.
KUBERNETES_VERSIONS = ("1.30.0", "1.34.0", "1.36.0")

_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
# The standard's list of volume types, and image volumes, which are read-only content like a ConfigMap's.
_VOLUME_TYPES = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)
_HOST_FIELDS = ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace")
_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
# What a worker or a gateway may need beyond its drain to end.
_MIN_TEARDOWN_S = 1


def problems(
    objects: Sequence[Object],
    hooks: Sequence[Object] = (),
    existing: frozenset[str] = frozenset(),
    versions: Sequence[str] = KUBERNETES_VERSIONS,
) -> list[str]:
    """Everything that is wrong, one line each."""
    everything = [*objects, *hooks]
    found = [f"{_id(each)}: {problem}" for each in everything for problem in _object_problems(each)]
    found += [f"{_id(each)}: {problem}" for each in everything for problem in _schema_problems(each, versions)]
    for owner, spec, labels in _pods(everything):
        found += [f"{owner}: {problem}" for problem in _pod_problems(spec)]
        found += [f"{owner}: {problem}" for problem in _reference_problems(spec, objects, existing)]
        bad = [value for value in labels.values() if not _LABEL_VALUE.fullmatch(value)]
        found += [f"{owner}: label value {value!r}" for value in bad]
    found += _selector_problems(objects)
    found += _port_problems(objects)
    names = [_id(each) for each in everything]
    return found + [f"{name}: twice" for name in set(names) if names.count(name) > 1]


def _id(each: Object) -> str:
    return f"{each['kind']}/{each['metadata']['name']}"


def _pods(objects: Sequence[Object]) -> Iterator[tuple[str, Object, dict[str, str]]]:
    """(name of the owner, pod spec, pod labels) of every pod and of every template of one."""
    for each in objects:
        if each["kind"] == "Pod":
            yield _id(each), each["spec"], each["metadata"]["labels"]
        elif each["kind"] in ("Deployment", "StatefulSet", "Job"):
            template = each["spec"]["template"]
            yield _id(each), template["spec"], template["metadata"]["labels"]


def _containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


# ---------------------------------------------------------------------------------------------------------------- objects


def _schema_problems(each: Object, versions: Sequence[str]) -> Iterator[str]:
    for version in versions:
        for error in _validator(version, each["kind"], each["apiVersion"]).iter_errors(each):
            yield f"Kubernetes {version}: {error.json_path}: {error.message}"


def _object_problems(each: Object) -> Iterator[str]:
    metadata = each["metadata"]
    if not _DNS_LABEL.fullmatch(metadata["name"]):
        yield f"name {metadata['name']!r} is not a DNS label that begins with a letter"
    labels = metadata.get("labels", {})
    for label in ("name", "instance", "component", "managed-by", "version", "part-of"):
        if f"app.kubernetes.io/{label}" not in labels:
            yield f"no label app.kubernetes.io/{label}"
    if each["kind"] == "ServiceAccount" and each.get("automountServiceAccountToken") is not False:
        yield "mounts its token"
    if each["kind"] in ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
        yield "no right is needed"


@functools.cache
def _definitions(version: str) -> Resource[Any]:
    return Resource.from_contents(_schema(version, "_definitions"))


@functools.cache
def _validator(version: str, kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    group, _, group_version = api_version.rpartition("/")
    suffix = f"{group.split('.')[0]}-{group_version}" if group else group_version
    schema = Resource.from_contents(_schema(version, f"{kind.lower()}-{suffix}"))
    registry = schema @ (_definitions(version) @ Registry())
    return jsonschema.Draft202012Validator(schema.contents, registry=registry)


def _schema(version: str, name: str) -> Any:
    root = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    return json.loads((root / f"v{version}-local-strict" / f"{name}.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------------- pods


def _pod_problems(spec: Object) -> Iterator[str]:
    yield from _security_problems(spec)
    if spec.get("automountServiceAccountToken") is not False:
        yield "mounts the service account's token"
    if spec.get("enableServiceLinks") is not False:
        yield "Services' variables could be read as options"
    ports = [port["containerPort"] for each in spec["containers"] for port in each.get("ports", [])]
    if len(set(ports)) != len(ports):
        yield f"ports are declared twice: {ports}"
    for container in spec["containers"]:
        for problem in _container_problems(container, spec):
            yield f"{container['name']}: {problem}"
    for container in _containers(spec):
        if not container.get("resources", {}).get("requests") or "memory" not in container["resources"].get(
            "limits", {}
        ):
            yield f"{container['name']}: needs requests and a memory limit"
        image = container["image"]
        if "@sha256:" not in image and (":" not in image.rsplit("/", 1)[-1] or image.endswith(":latest")):
            yield f"{container['name']}: image {image} is not pinned"
        names = [each["name"] for each in container.get("env", [])]
        if len(set(names)) != len(names):
            yield f"{container['name']}: a variable is set twice"


def _security_problems(spec: Object) -> Iterator[str]:
    """The restricted Pod Security Standard, and a read-only root file system."""
    pod = spec.get("securityContext", {})
    if pod.get("runAsNonRoot") is not True or pod.get("runAsUser") == 0:
        yield "may run as root"
    if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    yield from (f"{name} is set" for name in _HOST_FIELDS if spec.get(name))
    for volume in spec.get("volumes", []):
        if extra := set(volume) - {"name"} - _VOLUME_TYPES:
            yield f"volume {volume['name']} is a {extra}"
    for container in _containers(spec):
        own = container.get("securityContext", {})
        expected = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        if own != expected:
            yield f"{container['name']}: security context is {own}"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{container['name']}: has a port of the host"


def _container_problems(container: Object, spec: Object) -> Iterator[str]:
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    if not ports:
        return  # a test pod: it serves nothing and ends by itself
    if missing := [probe for probe in _PROBES if probe not in container]:
        yield f"no {', '.join(missing)}"
    for probe in _PROBES:
        action = container.get(probe, {}).get("httpGet") or container.get(probe, {}).get("grpc") or {}
        if action.get("port") not in (*ports, *ports.values()):
            yield f"{probe} asks port {action.get('port')}, declared are {ports}"
    drain = next((each["value"] for each in container.get("env", []) if each["name"] == "BATON_DRAIN_TIMEOUT_S"), None)
    if drain is not None:
        used = container["lifecycle"]["preStop"]["sleep"]["seconds"] + int(drain)
        if spec["terminationGracePeriodSeconds"] < used + _MIN_TEARDOWN_S:
            yield f"the grace period of {spec['terminationGracePeriodSeconds']} s is too short for {used} s of drain"


def _reference_problems(spec: Object, objects: Sequence[Object], existing: frozenset[str]) -> Iterator[str]:
    """Whatever a pod names must be there: volumes, Secrets and their keys, ConfigMaps and theirs, claims, accounts."""
    known = {_id(each): each for each in objects}
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    mounted = {mount["name"] for each in _containers(spec) for mount in each.get("volumeMounts", [])}
    yield from (f"volume {name} is mounted but not declared" for name in mounted - set(volumes))
    yield from (f"volume {name} is declared but not mounted" for name in set(volumes) - mounted)
    for container in _containers(spec):
        paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        if len(set(paths)) != len(paths):
            yield f"{container['name']}: two volumes at one path"
    yield from _missing(known, existing, "ServiceAccount", spec["serviceAccountName"], [])
    for secret in spec.get("imagePullSecrets", []):
        yield from _missing(known, existing, "Secret", secret["name"], [])
    for volume in volumes.values():
        if "secret" in volume:
            keys = [item["key"] for item in volume["secret"].get("items", [])]
            yield from _missing(known, existing, "Secret", volume["secret"]["secretName"], keys)
        if "configMap" in volume:
            yield from _missing(known, existing, "ConfigMap", volume["configMap"]["name"], [])
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            yield from _missing(known, existing, "PersistentVolumeClaim", claim, [])
    for container in _containers(spec):
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield from _missing(known, existing, "Secret", reference["name"], [reference["key"]])


def _missing(
    known: dict[str, Object], existing: frozenset[str], kind: str, name: str, keys: Sequence[str]
) -> Iterator[str]:
    wanted = f"{kind}/{name}"
    if wanted in existing:
        return
    if wanted not in known:
        yield f"{wanted} is not there"
        return
    yield from (f"{wanted} has no {key}" for key in keys if key not in known[wanted].get("data", {}))


# ---------------------------------------------------------------------------------------------------------- between objects


def _selector_problems(objects: Sequence[Object]) -> Iterator[str]:
    """Every selector must match pods, a workload's its own and no other's."""
    pods = {owner: labels for owner, _, labels in _pods(objects)}
    for each in objects:
        spec = each.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is None:
            continue
        wanted = selector if each["kind"] == "Service" else selector["matchLabels"]
        matched = [owner for owner, labels in pods.items() if wanted.items() <= labels.items()]
        if each["kind"] == "Deployment" and matched != [_id(each)]:
            yield f"{_id(each)}: selects {matched}"
        if len(matched) != 1:
            yield f"{_id(each)}: selects {matched or 'nothing'}"


def _port_problems(objects: Sequence[Object]) -> Iterator[str]:
    """Ports that Services and NetworkPolicies name must be declared by the pods they select."""
    declared = [
        (labels, {port["name"]: port["containerPort"] for each in spec["containers"] for port in each.get("ports", [])})
        for _, spec, labels in _pods(objects)
    ]

    def ports_of(selector: dict[str, str]) -> set[str]:
        return {name for labels, ports in declared if selector.items() <= labels.items() for name in ports}

    for each in objects:
        if each["kind"] == "Service":
            for port in each["spec"]["ports"]:
                if port["targetPort"] not in ports_of(each["spec"]["selector"]):
                    yield f"{_id(each)}: targets port {port['targetPort']}"
        if each["kind"] == "NetworkPolicy":
            own = each["spec"]["podSelector"]["matchLabels"]
            rules = [(own, rule) for rule in each["spec"].get("ingress", [])]
            rules += [
                (peer["podSelector"]["matchLabels"], rule)
                for rule in each["spec"].get("egress", [])
                for peer in rule.get("to", [])
                if "podSelector" in peer
            ]
            for selector, rule in rules:
                named = {port["port"] for port in rule.get("ports", []) if isinstance(port["port"], str)}
                yield from (f"{_id(each)}: allows port {name}" for name in named - ports_of(selector))
