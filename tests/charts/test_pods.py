"""What the pods of gateway and workers are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.services.runtime.health import READY_SERVICE
from baton.services.runtime.settings import GatewaySettings, Settings, WorkerSettings
from baton.services.runtime.settings_loader import load_settings
from tests.charts.fake_kubernetes import Object
from tests.charts.render import Rendered

Render = Callable[..., Rendered]
ROLES = ("gateway", "prefill", "decode")


@pytest.mark.parametrize("role", ROLES)
def test_the_process_accepts_its_variables(
    render: Render, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str
) -> None:
    """The very settings class of the process reads them, so that chart and code cannot drift apart."""
    values = {
        "model": {"uri": "pvc://models/m", "servedName": "m", "maxLength": 4096, "dtype": "bfloat16"},
        "gateway": {"apiKeys": {"existingSecret": "keys"}, "adminKeys": {"existingSecret": "operators"}},
    }
    rendered = render(values)
    assert rendered.container(role)["args"] == [role]
    settings_class: type[Settings] = GatewaySettings if role == "gateway" else WorkerSettings
    given = {name: value for name, value in rendered.env(role).items() if name.startswith("BATON_")}
    # For commands that run in the pod, `kubectl exec deploy/... -- baton drain WORKER`; not for its process.
    assert given.pop("BATON_ADMIN_URL", None) == ("http://127.0.0.1:8002" if role == "gateway" else None)
    assert {name.removeprefix("BATON_").lower() for name in given} <= set(settings_class.model_fields)
    for name, value in given.items():
        monkeypatch.setenv(name, _in_this_process(name, value, tmp_path))
    settings = load_settings(settings_class, {} if role == "gateway" else {"role": role})
    assert isinstance(settings, GatewaySettings | WorkerSettings)
    assert settings.model == "/models/m"
    assert settings.host == "0.0.0.0"
    assert settings.nats_url == "nats://demo-baton-nats:4222"
    assert settings.drain_timeout_s == 60
    assert not isinstance(settings, GatewaySettings) or settings.admin_port == 8002


def test_the_admin_listener_can_be_reached_inside_its_pod_alone(render: Render) -> None:
    rendered = render({"networkPolicy": {"enabled": True}})
    assert rendered.env("gateway")["BATON_ADMIN_PORT"] == "8002"
    assert {port["containerPort"] for port in rendered.container("gateway")["ports"]} == {8000, 8001}
    objects = [found for found in rendered.objects if found["kind"] in ("Service", "NetworkPolicy")]
    assert objects
    assert not [found for found in objects if "8002" in str(found) or "admin" in str(found)]


def test_times_to_detect_are_the_processes_defaults_unless_the_values_say_otherwise(render: Render) -> None:
    variables = {
        "BATON_PEER_TIMEOUT_S": ("peer_timeout_s", ROLES),
        "BATON_STUCK_AFTER_S": ("stuck_after_s", ("prefill", "decode")),
        "BATON_WORKER_WAIT_S": ("worker_wait_s", ("gateway",)),
        "BATON_FETCH": ("fetch", ("gateway",)),
    }
    rendered = render({})
    changed = render(
        {
            "peerTimeoutSeconds": 5,
            "engine": {"stuckAfterSeconds": 0},
            "gateway": {"workerWaitSeconds": 0.5, "fetch": "off"},
        }
    )
    told = {name: {changed.env(role)[name] for role in roles} for name, (_, roles) in variables.items()}
    assert list(told.values()) == [{"5"}, {"0"}, {"0.5"}, {"off"}]
    for name, (field, roles) in variables.items():
        for role in ROLES:
            assert (name in rendered.env(role)) == (role in roles), (name, role)
        for role in roles:
            settings_class: type[Settings] = GatewaySettings if role == "gateway" else WorkerSettings
            default = settings_class.model_fields[field].default
            assert rendered.env(role)[name] == (default if isinstance(default, str) else f"{default:g}")


def _in_this_process(name: str, value: Any, directory: Path) -> str:
    """A variable's value where the pod's files and the kubelet are not."""
    if name.endswith("_FILE"):
        stand_in = directory / name
        stand_in.write_text("0" * 64, encoding="utf-8")
        return str(stand_in)
    if isinstance(value, str):
        return value
    field = value.get("fieldRef", {}).get("fieldPath")
    return {"metadata.name": "demo-baton-decode-5d8c9f7b6d-x2x4z", "status.podIP": "10.1.2.3"}.get(field, "2")


@pytest.mark.parametrize("role", ROLES)
def test_grace_period_is_the_sum_of_its_parts(render: Render, role: str) -> None:
    drain = {"preStopSeconds": 7, "timeoutSeconds": 200, "teardownSeconds": 13}
    rendered = render({role: {"drain": drain}})
    assert rendered.pod_spec(role)["terminationGracePeriodSeconds"] == 220
    assert rendered.container(role)["lifecycle"] == {"preStop": {"sleep": {"seconds": 7}}}
    assert rendered.env(role)["BATON_DRAIN_TIMEOUT_S"] == "200"
    assert rendered.get("Deployment", role)["spec"]["progressDeadlineSeconds"] > 220 + 60


def test_a_rollout_may_take_as_long_as_ending_downloading_and_starting(render: Render) -> None:
    hub = {"downloadSeconds": 5000}
    rendered = render({"model": {"uri": "hf://o/m@1", "hub": hub}, "decode": {"probes": {"startupSeconds": 900}}})
    assert rendered.get("Deployment", "decode")["spec"]["progressDeadlineSeconds"] == 80 + 5000 + 900 + 60


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_is_asked_three_different_questions(render: Render, role: str) -> None:
    probes = {"startupSeconds": 601, "periodSeconds": 20, "livenessFailures": 5, "readinessFailures": 3}
    worker = render({role: {"probes": probes}}).container(role)
    # The model is loaded: 31 * 20 s are the first multiple that is enough.
    ready = {"port": 9000, "service": READY_SERVICE}
    assert worker["startupProbe"]["grpc"] == ready
    assert worker["startupProbe"]["failureThreshold"] == 31
    # The process steps, whatever its peers do and also while it drains.
    assert worker["livenessProbe"]["grpc"] == {"port": 9000}
    assert worker["livenessProbe"]["failureThreshold"] == 5
    assert worker["readinessProbe"]["grpc"] == ready
    assert worker["readinessProbe"]["failureThreshold"] == 3


def test_only_readiness_of_the_gateway_depends_on_others(render: Render) -> None:
    gateway = render().container("gateway")
    paths = {probe: gateway[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}


def test_rollouts_need_no_spare_worker_and_lose_no_gateway(render: Render) -> None:
    rendered = render()
    strategies = {role: rendered.get("Deployment", role)["spec"]["strategy"]["rollingUpdate"] for role in ROLES}
    worker = {"maxSurge": 0, "maxUnavailable": 1}
    assert strategies == {"gateway": {"maxSurge": 1, "maxUnavailable": 0}, "prefill": worker, "decode": worker}


def test_only_replicated_pods_have_a_disruption_budget(render: Render) -> None:
    values = {"prefill": {"replicas": 2}, "gateway": {"replicas": 3, "podDisruptionBudget": {"enabled": False}}}
    budgets = [each for each in render(values).objects if each["kind"] == "PodDisruptionBudget"]
    assert [each["metadata"]["name"] for each in budgets] == ["demo-baton-prefill"]
    assert budgets[0]["spec"]["maxUnavailable"] == 1


def test_a_gpu_worker_asks_for_its_gpus(render: Render) -> None:
    gpu = {"count": 2, "resourceName": "example.com/gpu"}
    resources = {"requests": {"cpu": 4}, "limits": {"memory": "8Gi"}}
    rendered = render(
        {
            "decode": {
                "device": "cuda",
                "gpu": gpu,
                "resources": resources,
                "runtimeClassName": "nvidia",
                "kvCacheMemory": "40GiB",
            }
        }
    )
    worker = rendered.container("decode")
    assert worker["resources"]["limits"] == {"memory": "8Gi", "example.com/gpu": 2}
    assert worker["image"] == "baton-worker-cuda:0.1.0"
    assert rendered.env("decode")["BATON_DEVICE"] == "cuda"
    assert rendered.pod_spec("decode")["runtimeClassName"] == "nvidia"
    # The other pool stays as it was: pools may differ.
    assert rendered.container("prefill")["image"] == "baton-worker-cpu:0.1.0"
    assert "example.com/gpu" not in rendered.container("prefill")["resources"]["limits"]


@pytest.mark.parametrize(
    ("pool", "threads"),
    [
        ({"threads": 3}, "3"),
        ({"resources": {"requests": {"cpu": "2500m"}}}, "requests.cpu"),
        ({"resources": {"requests": {"cpu": None}, "limits": {"cpu": 2}}}, "limits.cpu"),
        ({"resources": {"requests": {"cpu": None}}}, None),
    ],
)
def test_threads_follow_the_cpus(render: Render, pool: dict[str, Any], threads: str | None) -> None:
    value = render({"decode": pool}).env("decode").get("BATON_THREADS_PER_WORKER")
    assert (value["resourceFieldRef"]["resource"] if isinstance(value, dict) else value) == threads


def test_scheduling_is_handed_on(render: Render) -> None:
    given = {
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 2, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
        ],
        "priorityClassName": "high",
    }
    rendered = render(dict.fromkeys(ROLES, given))
    for role in ROLES:
        spec = rendered.pod_spec(role)
        assert {name: spec[name] for name in given} == given


def test_pools_prefer_each_others_zone_and_spread_over_nodes(render: Render) -> None:
    rendered = render()
    for role, peer in (("prefill", "decode"), ("decode", "prefill")):
        spec = rendered.pod_spec(role)
        (preference,) = spec["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        term = preference["podAffinityTerm"]
        assert term["topologyKey"] == "topology.kubernetes.io/zone"
        assert term["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == peer
        (spread,) = spec["topologySpreadConstraints"]
        assert spread["whenUnsatisfiable"] == "ScheduleAnyway"
        assert spread["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == role


def test_pools_without_a_preference(render: Render) -> None:
    assert "affinity" not in render({"engine": {"affinityTopologyKey": ""}}).pod_spec("decode")


def test_images_may_have_a_registry_a_tag_and_a_digest(render: Render) -> None:
    digest = f"sha256:{'a' * 64}"
    rendered = render(
        {
            "image": {"registry": "registry.example.com/team/", "tag": "1.2"},
            "gateway": {"image": {"repository": "my-gateway"}},
            "prefill": {"image": {"tag": "1.3"}},
            "decode": {"image": {"digest": digest}},
        }
    )
    assert [rendered.container(role)["image"] for role in ROLES] == [
        "registry.example.com/team/my-gateway:1.2",
        "registry.example.com/team/baton-worker-cpu:1.3",
        f"registry.example.com/team/baton-worker-cpu@{digest}",
    ]


def test_extra_variables_and_volumes_reach_the_container(render: Render) -> None:
    extra = {
        "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
        "extraVolumes": [{"name": "data", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "data", "mountPath": "/data"}],
        "podAnnotations": {"example.com/a": "b"},
        "podLabels": {"team": "x"},
    }
    rendered = render(dict.fromkeys(ROLES, extra))
    for role in ROLES:
        assert rendered.env(role)["NCCL_DEBUG"] == "WARN"
        assert {"name": "data", "emptyDir": {}} in rendered.pod_spec(role)["volumes"]
        assert {"name": "data", "mountPath": "/data"} in rendered.container(role)["volumeMounts"]
        metadata: Object = rendered.get("Deployment", role)["spec"]["template"]["metadata"]
        assert metadata["annotations"]["example.com/a"] == "b"
        assert metadata["labels"]["team"] == "x"


def test_a_platform_may_choose_the_user(render: Render) -> None:
    security = render({"security": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}).pod_spec("decode")
    assert security["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


CERTIFICATES = {
    "tls": {"gatewaySecret": "gateway-tls", "workerSecret": "worker-tls"},
    "gateway": {"tls": {"existingSecret": "public-tls", "clientCASecret": "client-ca"}},
}


def test_without_certificates_who_may_connect_is_left_to_the_network(render: Render) -> None:
    rendered = render({})
    for role in ROLES:
        assert rendered.env(role)["BATON_ALLOW_INSECURE_BIND"] == "true"
        assert not {name for name in rendered.env(role) if name.startswith(("BATON_TLS", "BATON_SSL"))}


@pytest.mark.parametrize("role", ROLES)
def test_certificates_are_mounted_where_the_process_looks_for_them(render: Render, role: str) -> None:
    rendered = render(CERTIFICATES)
    env, container = rendered.env(role), rendered.container(role)
    assert "BATON_ALLOW_INSECURE_BIND" not in env
    files = {name: Path(value) for name, value in env.items() if name.startswith(("BATON_TLS", "BATON_SSL"))}
    assert {"BATON_TLS_CERT_FILE", "BATON_TLS_KEY_FILE", "BATON_TLS_CA_FILE"} <= files.keys()
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in rendered.pod_spec(role)["volumes"]}
    for path in files.values():
        mount = mounts[str(path.parent)]
        assert mount["readOnly"]
        assert "subPath" not in mount  # such a file would never change
        assert volumes[mount["name"]]["secret"]["secretName"]
    secret = volumes[mounts["/etc/baton/tls"]["name"]]["secret"]["secretName"]
    assert secret == ("gateway-tls" if role == "gateway" else "worker-tls")


def test_probes_speak_tls(render: Render) -> None:
    rendered = render(CERTIFICATES)
    gateway, worker = rendered.container("gateway"), rendered.container("decode")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert gateway[probe]["httpGet"]["scheme"] == "HTTPS"
        assert worker[probe]["exec"]["command"][:4] == ["python", "-m", "baton.services.healthcheck", "grpc"]
    assert worker["readinessProbe"]["exec"]["command"][4:] == [READY_SERVICE]
    assert worker["livenessProbe"]["exec"]["command"][4:] == []
