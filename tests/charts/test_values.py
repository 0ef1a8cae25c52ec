"""Values that make no sense are refused with a message that says what to change, before anything is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from helm_sdkpy import InstallError

from tests.charts.fake_kubernetes import FakeKubernetes
from tests.charts.render import CHART, Cluster

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))

BY_SCHEMA: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"replicaCount": 2}, "replicaCount"),
    "unknown key in a section": ({"decode": {"replica": 2}}, "replica"),
    "negative replicas": ({"prefill": {"replicas": -1}}, "minimum: got -1, want 1"),
    "no replicas": ({"decode": {"replicas": 0}}, "minimum: got 0, want 1"),
    "fraction of a replica": ({"decode": {"replicas": 1.5}}, "got number, want integer"),
    "unknown device": ({"decode": {"device": "tpu"}}, "one of 'cpu', 'cuda'"),
    "shared memory between pods": ({"engine": {"transport": "shm"}}, "one of 'auto', 'tcp'"),
    "block size": ({"engine": {"blockSize": 24}}, "/engine/blockSize"),
    "unit of a size": ({"decode": {"kvCacheMemory": "20Gi"}}, "/decode/kvCacheMemory"),
    "drain longer than a process allows": ({"gateway": {"drain": {"timeoutSeconds": 7200}}}, "maximum"),
    "no time for balancers": ({"gateway": {"drain": {"preStopSeconds": 0}}}, "minimum"),
    "a silence that no network keeps to": ({"peerTimeoutSeconds": 0.1}, "minimum"),
    "no limit for a hang": ({"engine": {"stuckAfterSeconds": -1}}, "minimum"),
    "a wait without end": ({"gateway": {"workerWaitSeconds": 1e6}}, "maximum"),
    "unknown way to fetch": ({"gateway": {"fetch": "sometimes"}}, "one of 'auto', 'always', 'off'"),
    "port": ({"gateway": {"service": {"port": 80000}}}, "maximum"),
    "root": ({"security": {"runAsUser": 0}}, "minimum"),
    "token in the address": (
        {"nats": {"enabled": False, "external": {"url": "nats://me:word@host"}}},
        "/nats/external/url",
    ),
    "name of a Secret": ({"blockKey": {"existingSecret": "My Secret"}}, "/blockKey/existingSecret"),
    "digest": ({"decode": {"image": {"digest": "sha256:abc"}}}, "/decode/image/digest"),
    "value as a variable": ({"decode": {"extraEnv": [{"name": "A B", "value": "1"}]}}, "/decode/extraEnv/0/name"),
}

BY_TEMPLATE: dict[str, tuple[dict[str, Any], str]] = {
    "both kinds of NATS": (
        {"nats": {"external": {"url": "nats://n:4222"}}},
        "nats.external: set, but nats.enabled=true",
    ),
    "certificates for some": ({"tls": {"gatewaySecret": "s"}}, "gatewaySecret and workerSecret belong together"),
    "a CA of clients alone": ({"gateway": {"tls": {"clientCASecret": "s"}}}, "needs gateway.tls.existingSecret"),
    "no NATS": ({"nats": {"enabled": False}}, "needs nats.external.url"),
    "token for the wrong NATS": (
        {"nats": {"enabled": False, "external": {"url": "nats://n"}, "auth": {"existingSecret": "s"}}},
        "set nats.external.tokenSecret",
    ),
    "keys in the values": ({"gateway": {"apiKeys": {"keys": ["k"]}}}, "set gateway.apiKeys.existingSecret"),
    "keys in the values and in a Secret": (
        {"gateway": {"apiKeys": {"keys": ["k"], "existingSecret": "s"}}},
        "keys come from a Secret only",
    ),
    "grace period shorter than the drain": (
        {"decode": {"terminationGracePeriodSeconds": 5}},
        "is the sum of preStopSeconds, timeoutSeconds and teardownSeconds in decode.drain",
    ),
    "grace period of the gateway": ({"gateway": {"terminationGracePeriodSeconds": 5}}, "in gateway.drain"),
    "tag and digest": (
        {"gateway": {"image": {"tag": "1", "digest": f"sha256:{'0' * 64}"}}},
        "gateway.image: tag and digest are both set",
    ),
    "a rollout that cannot move": ({"prefill": {"rollout": {"maxUnavailable": 0}}}, "no pod could ever be replaced"),
    "a rollout that cannot move, in percent": (
        {"prefill": {"rollout": {"maxUnavailable": "0%"}}},
        "no pod could ever be replaced",
    ),
    "no time to start": (
        {"decode": {"probes": {"startupSeconds": 5}}},
        "startupSeconds (5) is less than periodSeconds (10)",
    ),
    "unknown kind of model": ({"model": {"uri": "s3://bucket/model"}}, '"s3://bucket/model" is none of bundled'),
    "hub model without a revision": ({"model": {"uri": "hf://org/name"}}, "hf://org/name@revision"),
    "claim that climbs out": ({"model": {"uri": "pvc://../x"}}, "is none of"),
    "hub settings without a hub model": (
        {"model": {"hub": {"tokenSecret": "t"}}},
        'model.hub.tokenSecret: only for an hf:// model, but model.uri is "bundled"',
    ),
    "GPU among the resources": (
        {"decode": {"resources": {"limits": {"nvidia.com/gpu": 1, "memory": "4Gi"}}}},
        "set decode.device=cuda and decode.gpu.count instead",
    ),
    "KV cache larger than the container": (
        {"prefill": {"kvCacheMemory": "4GiB"}},
        "prefill.kvCacheMemory: 4GiB does not fit in the container's memory limit of 3Gi",
    ),
    "decimal against binary units": (
        {"prefill": {"kvCacheMemory": "1GiB", "resources": {"limits": {"memory": "1G"}}}},
        "does not fit",
    ),
    "both ports the same": ({"gateway": {"service": {"port": 80, "grpcPort": 80}}}, "port and grpcPort are both 80"),
    "account without a name": ({"serviceAccount": {"create": False}}, "needs serviceAccount.name"),
    "account twice": ({"serviceAccount": {"name": "x"}}, "needs serviceAccount.create=false"),
    "variable of the chart's": (
        {"decode": {"extraEnv": [{"name": "BATON_PORT", "value": "1"}]}},
        "decode.extraEnv: BATON_PORT is set by the chart",
    ),
    "variable twice": (
        {"gateway": {"extraEnv": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}},
        "gateway.extraEnv: A is set",
    ),
}


@pytest.mark.parametrize("case", BY_SCHEMA)
def test_schema_refuses(cluster: Cluster, case: str) -> None:
    values, message = BY_SCHEMA[case]
    with pytest.raises(InstallError, match=re.escape(message)) as refused:
        cluster.install(values)
    assert "specifications of the schema" in str(refused.value)
    assert cluster.stored() == []


@pytest.mark.parametrize("case", BY_TEMPLATE)
def test_contradictions_are_refused(cluster: Cluster, case: str) -> None:
    values, message = BY_TEMPLATE[case]
    with pytest.raises(InstallError, match=re.escape(message)):
        cluster.install(values)
    assert cluster.stored() == []


def test_all_contradictions_are_named_at_once(cluster: Cluster) -> None:
    values = {
        "nats": {"enabled": False},
        "model": {"uri": "nowhere"},
        "decode": {"rollout": {"maxUnavailable": 0}, "kvCacheMemory": "9GiB"},
    }
    with pytest.raises(InstallError) as refused:
        cluster.install(values)
    problems = [line for line in str(refused.value).splitlines() if line.startswith("- ")]
    assert [problem.split(":")[0] for problem in problems] == [
        "- model.uri",
        "- nats.enabled=false",
        "- decode.rollout",
        "- decode.kvCacheMemory",
    ]


def test_a_name_that_no_service_may_have_is_refused(cluster: Cluster) -> None:
    with pytest.raises(InstallError, match="set fullnameOverride"):
        cluster.install({}, release="4711")
    assert cluster.install({"fullnameOverride": "agent"}, release="4711").get("Service", "gateway")


def test_an_old_cluster_is_refused() -> None:
    with FakeKubernetes("1.29.0") as api, pytest.raises(InstallError, match=r"1\.30\.0-0"):
        Cluster(api).install({})


def test_an_image_volume_on_an_old_cluster_is_refused() -> None:
    with FakeKubernetes("1.30.0") as api, pytest.raises(InstallError, match=r"need Kubernetes 1\.31"):
        Cluster(api).install({"model": {"uri": "oci://registry.example.com/m:1"}})


def test_schema_and_values_have_the_same_keys() -> None:
    # Two keys are in the schema only, so that the templates can say where to set them instead; `global` is Helm's.
    refused = {f"{name}.terminationGracePeriodSeconds" for name in ("gateway", "prefill", "decode")}
    assert set(_schema_keys(SCHEMA, "")) == set(_value_keys(VALUES, "")) | refused | {"gateway.apiKeys.keys", "global"}


def test_schema_refuses_unknown_keys_everywhere() -> None:
    for section in _sections(SCHEMA, ""):
        assert _resolved(section)["additionalProperties"] is False


def test_both_pools_have_the_same_shape() -> None:
    assert VALUES["prefill"] == VALUES["decode"]
    assert SCHEMA["properties"]["prefill"] == SCHEMA["properties"]["decode"]


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.Draft7Validator(SCHEMA).validate(VALUES)


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return dict(SCHEMA["definitions"][reference.rsplit("/", 1)[1]]) if reference else schema


def _schema_keys(schema: dict[str, Any], path: str) -> Iterator[str]:
    """Dotted paths of all keys that hold a value. Requests and limits are one value: Kubernetes', not ours."""
    for key, child in schema["properties"].items():
        resolved, own = _resolved(child), f"{path}{key}"
        if "properties" in resolved and key != "resources":
            yield from _schema_keys(resolved, f"{own}.")
        else:
            yield own


def _value_keys(values: dict[str, Any], path: str) -> Iterator[str]:
    for key, child in values.items():
        if isinstance(child, dict) and child and key != "resources":
            yield from _value_keys(child, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def _sections(schema: dict[str, Any], path: str) -> Iterator[dict[str, Any]]:
    resolved = _resolved(schema)
    if "properties" in resolved:
        yield resolved
        for child in resolved["properties"].values():
            yield from _sections(child, path)
