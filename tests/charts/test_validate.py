"""The validator finds what it is there to find: each fault, put into a chart that is right, is reported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest

from tests.charts.fake_kubernetes import FakeKubernetes, Object
from tests.charts.render import Cluster, Rendered
from tests.charts.validate import KUBERNETES_VERSIONS, problems


@pytest.fixture(scope="module")
def sound() -> Rendered:
    with FakeKubernetes() as api:
        return Cluster(api).install({})


def _find(objects: Sequence[Object], kind: str, end: str) -> Object:
    return next(each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(end))


def _pod(objects: list[Object]) -> Object:
    spec: Object = _find(objects, "Deployment", "-decode")["spec"]["template"]["spec"]
    return spec


def _worker(objects: list[Object]) -> Object:
    worker: Object = _pod(objects)["containers"][0]
    return worker


FAULTS: dict[str, tuple[Callable[[list[Object]], object], str]] = {
    "unknown field": (lambda o: _worker(o).update(imagePulPolicy="Always"), "'imagePulPolicy' was unexpected"),
    "wrong type": (lambda o: _find(o, "Deployment", "-decode")["spec"].update(replicas="2"), "'2' is not of type"),
    "missing field": (lambda o: _find(o, "Deployment", "-decode")["spec"].pop("selector"), "'selector' is a required"),
    "bad name": (lambda o: _find(o, "Service", "-decode")["metadata"].update(name="A_b"), "is not a DNS label"),
    "twice": (lambda o: o.append(_find(o, "Service", "-decode")), "twice"),
    "missing label": (
        lambda o: _find(o, "Service", "-nats")["metadata"]["labels"].pop("app.kubernetes.io/name"),
        "no label",
    ),
    "token of the account": (
        lambda o: _find(o, "ServiceAccount", "-nats").pop("automountServiceAccountToken"),
        "mounts its token",
    ),
    "token in the pod": (lambda o: _pod(o).pop("automountServiceAccountToken"), "mounts the service account's token"),
    "service links": (lambda o: _pod(o).pop("enableServiceLinks"), "could be read as options"),
    "root": (lambda o: _pod(o)["securityContext"].update(runAsUser=0), "may run as root"),
    "perhaps root": (lambda o: _pod(o)["securityContext"].pop("runAsNonRoot"), "may run as root"),
    "seccomp": (lambda o: _pod(o)["securityContext"].pop("seccompProfile"), "no seccomp profile"),
    "the host's processes": (lambda o: _pod(o).update(hostIPC=True), "hostIPC is set"),
    "the host's files": (
        lambda o: _pod(o)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
        "is a {'hostPath'}",
    ),
    "capabilities": (lambda o: _worker(o)["securityContext"].pop("capabilities"), "security context is"),
    "writable root": (
        lambda o: _worker(o)["securityContext"].update(readOnlyRootFilesystem=False),
        "security context is",
    ),
    "port of the host": (lambda o: _worker(o)["ports"][0].update(hostPort=9000), "has a port of the host"),
    "no limit": (lambda o: _worker(o)["resources"].pop("limits"), "needs requests and a memory limit"),
    "moving image": (lambda o: _worker(o).update(image="worker:latest"), "is not pinned"),
    "image without a tag": (lambda o: _worker(o).update(image="host:5000/worker"), "is not pinned"),
    "variable twice": (lambda o: _worker(o)["env"].append(_worker(o)["env"][0]), "a variable is set twice"),
    "no probe": (lambda o: _worker(o).pop("livenessProbe"), "no livenessProbe"),
    "probe of another port": (lambda o: _worker(o)["livenessProbe"]["grpc"].update(port=1), "asks port 1"),
    "short grace period": (lambda o: _pod(o).update(terminationGracePeriodSeconds=65), "is too short for 65 s"),
    "volume not declared": (
        lambda o: _pod(o).update(volumes=[v for v in _pod(o)["volumes"] if v["name"] != "tmp"]),
        "tmp is mounted but not declared",
    ),
    "volume not mounted": (
        lambda o: _pod(o)["volumes"].append({"name": "x", "emptyDir": {}}),
        "x is declared but not mounted",
    ),
    "no Secret": (lambda o: o.remove(_find(o, "Secret", "-block-key")), "Secret/demo-baton-block-key is not there"),
    "no key in a Secret": (lambda o: _find(o, "Secret", "-block-key")["data"].clear(), "has no block-key"),
    "no key in a variable's Secret": (lambda o: _find(o, "Secret", "-token")["data"].clear(), "has no nats-token"),
    "no ConfigMap": (lambda o: o.remove(_find(o, "ConfigMap", "-nats")), "ConfigMap/demo-baton-nats is not there"),
    "no account": (lambda o: o.remove(_find(o, "ServiceAccount", "-nats")), "ServiceAccount/demo-baton-nats is not"),
    "Service without pods": (
        lambda o: _find(o, "Service", "-nats")["spec"]["selector"].update(a="b"),
        "selects nothing",
    ),
    "Service with all pods": (
        lambda o: _find(o, "Service", "-nats")["spec"]["selector"].pop("app.kubernetes.io/component"),
        "selects ['Deployment",
    ),
    "Deployment with others' pods": (
        lambda o: _find(o, "Deployment", "-nats")["spec"]["selector"]["matchLabels"].pop("app.kubernetes.io/component"),
        "Deployment/demo-baton-nats: selects",
    ),
    "Service's port": (
        lambda o: _find(o, "Service", "-nats")["spec"]["ports"][0].update(targetPort="bus"),
        "targets port bus",
    ),
    "policy's port": (
        lambda o: _find(o, "NetworkPolicy", "-nats")["spec"]["ingress"][0]["ports"][0].update(port="bus"),
        "allows port bus",
    ),
    "a right": (
        lambda o: o.append(
            {**_find(o, "ServiceAccount", "-nats"), "kind": "Role", "apiVersion": "rbac.authorization.k8s.io/v1"}
        ),
        "no right is needed",
    ),
}


def test_the_sound_chart_is_sound(sound: Rendered) -> None:
    assert problems(sound.objects, sound.hooks) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(sound: Rendered, fault: str) -> None:
    break_it, message = FAULTS[fault]
    objects = copy.deepcopy(sound.objects)
    break_it(objects)
    found = problems(objects, copy.deepcopy(sound.hooks), versions=KUBERNETES_VERSIONS[-1:])
    assert any(message in problem for problem in found), found
