"""A release over its life: names, generated Secrets, accounts, network policies, upgrades and its end."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.charts.fake_kubernetes import FakeKubernetes, Object, secret
from tests.charts.render import NAMESPACE, Cluster, Rendered
from tests.charts.validate import problems

Render = Callable[..., Rendered]


def _data(each: Object, key: str) -> bytes:
    return base64.b64decode(each["data"][key])


def test_generated_secrets_are_random_and_fit_their_readers(render: Render) -> None:
    rendered = render()
    block_key = _data(rendered.get("Secret", "block-key"), "block-key")
    token = _data(rendered.get("Secret", "nats-token"), "nats-token")
    assert block_key != token
    for generated in (block_key, token):
        assert len(generated) == 64  # a worker reads 16 to 64 bytes
        assert len(bytes.fromhex(generated.decode())) == 32


def test_two_installations_have_different_secrets() -> None:
    keys = set()
    for _ in range(2):
        with FakeKubernetes() as api:
            keys.add(_data(Cluster(api).install({}).get("Secret", "block-key"), "block-key"))
    assert len(keys) == 2


def test_upgrades_keep_generated_secrets(cluster: Cluster) -> None:
    before = cluster.install({})
    after = cluster.upgrade({"decode": {"replicas": 3}})
    for name in ("block-key", "nats-token"):
        assert after.get("Secret", name)["data"] == before.get("Secret", name)["data"]
    assert after.get("Deployment", "decode")["spec"]["replicas"] == 3
    # Nothing in the pods changed, so nothing restarts.
    assert after.pod_spec("decode") == before.pod_spec("decode")


def test_existing_secrets_are_used_and_none_is_made(cluster: Cluster) -> None:
    for name in ("mine", "bus", "keys"):
        cluster.api.objects["Secret", NAMESPACE, name] = secret(NAMESPACE, name, k="x" * 32)
    rendered = cluster.install(
        {
            "blockKey": {"existingSecret": "mine", "key": "k"},
            "nats": {"auth": {"existingSecret": "bus", "key": "k"}},
            "gateway": {"apiKeys": {"existingSecret": "keys", "key": "k"}},
        }
    )
    assert sorted(each["metadata"]["name"] for each in rendered.objects if each["kind"] == "Secret") == [
        "bus",
        "keys",
        "mine",
    ]
    own = [each for each in rendered.objects if each["kind"] != "Secret"]
    assert problems(own, rendered.hooks, frozenset({"Secret/mine", "Secret/bus", "Secret/keys"})) == []


def test_secrets_stand_in_no_other_object(render: Render) -> None:
    rendered = render()
    secrets = [each for each in rendered.objects if each["kind"] == "Secret"]
    rest = json.dumps([each for each in rendered.objects if each["kind"] != "Secret"] + rendered.hooks) + rendered.notes
    values = [value for each in secrets for value in each["data"].values()]
    assert len(values) == 2
    for value in values:
        assert value not in rest
        assert base64.b64decode(value).decode() not in rest


def test_only_those_who_need_a_secret_have_it(render: Render) -> None:
    rendered = render({"gateway": {"apiKeys": {"existingSecret": "keys"}, "tenants": {"existingSecret": "tenants"}}})
    mounted = {
        role: {each["secret"]["secretName"] for each in rendered.pod_spec(role)["volumes"] if "secret" in each}
        for role in ("gateway", "prefill", "decode", "nats")
    }
    shared = {"demo-baton-block-key", "demo-baton-nats-token"}
    assert mounted == {"gateway": {"keys", "tenants"} | shared, "prefill": shared, "decode": shared, "nats": set()}


def test_a_tenants_file_is_where_the_gateway_is_told(render: Render) -> None:
    rendered = render({"gateway": {"tenants": {"existingSecret": "ours", "key": "k"}}})
    spec = rendered.pod_spec("gateway")
    (volume,) = (each for each in spec["volumes"] if each["name"] == "tenants")
    assert volume["secret"]["items"] == [{"key": "k", "path": "tenants.yaml"}]
    (container,) = spec["containers"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "tenants")
    assert env["BATON_TENANTS_FILE"] == f"{mount['mountPath']}/tenants.yaml"
    assert "subPath" not in mount  # it would never change
    assert "WARNING: no API key" not in rendered.notes


def test_a_file_of_admin_keys_is_where_the_gateway_is_told(render: Render) -> None:
    assert "BATON_ADMIN_KEY_FILE" not in render().env("gateway")
    rendered = render({"gateway": {"adminKeys": {"existingSecret": "operators", "key": "k"}}})
    (volume,) = (each for each in rendered.pod_spec("gateway")["volumes"] if each["name"] == "admin-keys")
    assert volume["secret"]["secretName"] == "operators"
    assert volume["secret"]["items"] == [{"key": "k", "path": "admin-keys"}]
    (mount,) = (each for each in rendered.container("gateway")["volumeMounts"] if each["name"] == "admin-keys")
    assert rendered.env("gateway")["BATON_ADMIN_KEY_FILE"] == f"{mount['mountPath']}/admin-keys"
    assert "subPath" not in mount  # it would never change
    assert not [
        each for role in ("prefill", "decode") for each in rendered.pod_spec(role)["volumes"] if "admin" in str(each)
    ]


def test_the_end_of_a_release_leaves_nothing(cluster: Cluster) -> None:
    cluster.install({"gateway": {"replicas": 2}})
    assert cluster.stored()
    cluster.uninstall()
    assert cluster.api.objects == {}


@pytest.mark.parametrize(
    ("release", "values", "prefix"),
    [
        ("demo", {}, "demo-baton"),
        ("my-baton", {}, "my-baton"),
        ("demo.v2", {}, "demo-v2-baton"),
        ("demo", {"nameOverride": "llm"}, "demo-llm"),
        ("demo", {"fullnameOverride": "llm"}, "llm"),
    ],
)
def test_names(render: Render, release: str, values: dict[str, Any], prefix: str) -> None:
    rendered = render(values, release=release)
    names = {each["metadata"]["name"] for each in rendered.objects if each["kind"] == "Deployment"}
    assert names == {f"{prefix}-{role}" for role in ("gateway", "prefill", "decode", "nats")}
    assert problems(rendered.objects, rendered.hooks) == []


def test_long_names_are_cut_without_becoming_one(cluster: Cluster) -> None:
    longest = "a" * 52
    first, second = (cluster.install({}, release=f"{longest}{end}") for end in "xy")
    names = [each["metadata"]["name"] for each in second.objects if each["kind"] == "Deployment"]
    assert len(set(names)) == 8
    # A pod's name is its worker's id, of at most 64 characters: the name, a hash of 10 and 5 random ones.
    assert max(map(len, names)) + len("-0123456789-abcde") <= 64
    assert len(first.objects) * 2 == len(second.objects)


def test_clusters_on_one_nats_server_keep_apart() -> None:
    names = set()
    for namespace in ("blue", "green"):
        with FakeKubernetes() as api:
            rendered = Cluster(api, namespace).install({})
            names |= {rendered.env(role)["BATON_CLUSTER"] for role in ("gateway", "prefill", "decode")}
    assert names == {"blue-demo-baton", "green-demo-baton"}


def test_a_cluster_name_may_be_given(render: Render) -> None:
    name = "c" * 64
    rendered = render({"clusterName": name})
    assert {rendered.env(role)["BATON_CLUSTER"] for role in ("gateway", "prefill", "decode")} == {name}


def test_a_derived_cluster_name_fits() -> None:
    with FakeKubernetes() as api:
        name = Cluster(api, "n" * 63).install({}).env("decode")["BATON_CLUSTER"]
    assert len(name) == 64
    assert name.startswith("n" * 50)


def test_accounts_have_no_token_and_no_right(render: Render) -> None:
    rendered = render({"serviceAccount": {"annotations": {"a": "b"}}})
    accounts = [each for each in rendered.objects if each["kind"] == "ServiceAccount"]
    assert len(accounts) == 4
    for account in accounts:
        assert account["automountServiceAccountToken"] is False
        assert account["metadata"]["annotations"]["a"] == "b"
    assert not [each for each in rendered.objects if "Role" in each["kind"]]


def _peers(rule: Object, direction: str) -> set[str]:
    labels = [peer.get("podSelector", {}).get("matchLabels", {}) for peer in rule.get(direction, [])]
    return {each.get("app.kubernetes.io/component", "other") for each in labels}


def test_pods_reach_only_whom_they_need(render: Render) -> None:
    rendered = render()
    reached = {}
    for role in ("gateway", "prefill", "decode", "nats"):
        spec = rendered.get("NetworkPolicy", role)["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        reached[role] = {
            (peer, port["port"])
            for rule in spec["egress"]
            for peer in (_peers(rule, "to") or {"anyone"})
            for port in rule["ports"]
        }
    names, bus = ("anyone", 53), ("nats", "client")
    worker = {(peer, port) for peer in ("prefill", "decode") for port in ("grpc", "kv")} | {names, bus}
    assert reached == {
        "gateway": {("prefill", "grpc"), ("decode", "grpc"), names, bus},
        "prefill": worker,
        "decode": worker,
        "nats": set(),
    }


def test_pods_are_reached_only_by_whom_they_serve(render: Render) -> None:
    rendered = render()

    def admitted(role: str) -> list[tuple[set[str], list[Any]]]:
        rules = rendered.get("NetworkPolicy", role)["spec"]["ingress"]
        return [(_peers(rule, "from"), [port["port"] for port in rule["ports"]]) for rule in rules]

    workers = {"prefill", "decode"}
    assert admitted("prefill") == admitted("decode") == [({"gateway"}, ["grpc"]), (workers, ["grpc", "kv"])]
    assert admitted("nats") == [({"gateway"} | workers, ["client"])]
    assert admitted("gateway") == [(set(), ["http", "grpc"])]


def test_who_reaches_the_gateway_may_be_named(render: Render) -> None:
    peer = {"namespaceSelector": {"matchLabels": {"team": "web"}}}
    rendered = render({"networkPolicy": {"gatewayFrom": [peer]}})
    (rule,) = rendered.get("NetworkPolicy", "gateway")["spec"]["ingress"]
    assert rule["from"][0] == peer
    # The chart's own test comes through as well.
    assert rule["from"][1]["podSelector"]["matchLabels"].items() <= rendered.hooks[0]["metadata"]["labels"].items()


def test_a_hub_model_opens_the_way_to_the_hub(render: Render) -> None:
    extra = {"ports": [{"port": 8443}]}
    rendered = render({"model": {"uri": "hf://o/m@1"}, "networkPolicy": {"extraEgress": [extra]}})
    for role in ("gateway", "prefill", "decode"):
        egress = rendered.get("NetworkPolicy", role)["spec"]["egress"]
        assert {"ports": [{"port": 443}]} in egress
        assert egress[-1] == extra


def test_external_nats_opens_the_way_to_its_ports(render: Render) -> None:
    url = "nats://a:4333,tls://b,nats://[fd00::1]:4333"
    rendered = render({"nats": {"enabled": False, "external": {"url": url}}})
    assert {"ports": [{"port": 4333}, {"port": 4222}]} in rendered.get("NetworkPolicy", "decode")["spec"]["egress"]
    assert rendered.env("gateway")["BATON_NATS_URL"] == url
    assert "BATON_NATS_TOKEN_FILE" not in rendered.env("gateway")
    assert "used without a token" in rendered.notes
    assert not [each for each in rendered.objects if each["metadata"]["name"].endswith("nats")]


def test_no_policy_when_switched_off(render: Render) -> None:
    rendered = render({"networkPolicy": {"enabled": False}})
    assert not [each for each in rendered.objects if each["kind"] == "NetworkPolicy"]
    assert "networkPolicy.enabled=false" in rendered.notes


def test_the_test_pod_asks_the_gateways_service(render: Render) -> None:
    rendered = render({"gateway": {"apiKeys": {"existingSecret": "keys"}, "service": {"port": 80}}})
    (pod,) = rendered.hooks
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    env = {each["name"]: each["value"] for each in pod["spec"]["containers"][0]["env"]}
    name = rendered.get("Service", "gateway")["metadata"]["name"]
    assert env == {
        "GATEWAY_URL": f"http://{name}:80",
        "TIMEOUT_S": "300",
        "API_KEY_FILE": "/etc/baton/api-keys/api-keys",
    }
    assert pod["spec"]["restartPolicy"] == "Never"


def test_no_test_pod_when_switched_off(render: Render) -> None:
    rendered = render({"tests": {"enabled": False}})
    assert rendered.hooks == []
    assert not [each for each in rendered.objects if each["metadata"]["name"].endswith("-scripts")]
