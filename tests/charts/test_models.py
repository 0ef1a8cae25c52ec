"""Where the model comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.charts.fake_kubernetes import Object
from tests.charts.render import Rendered
from tests.charts.validate import KUBERNETES_VERSIONS, problems

Render = Callable[..., Rendered]
ROLES = ("gateway", "prefill", "decode")
COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"


def _volume(rendered: Rendered, role: str) -> Object | None:
    return next((each for each in rendered.pod_spec(role)["volumes"] if each["name"] == "model"), None)


def _mount(rendered: Rendered, role: str) -> Object | None:
    return next((each for each in rendered.container(role)["volumeMounts"] if each["name"] == "model"), None)


@pytest.mark.parametrize("role", ROLES)
def test_the_bundled_model_needs_nothing(render: Render, role: str) -> None:
    rendered = render()
    assert "BATON_MODEL" not in rendered.env(role)
    assert _volume(rendered, role) is None
    assert "initContainers" not in rendered.pod_spec(role)


@pytest.mark.parametrize("role", ROLES)
def test_a_folder_in_the_image_needs_a_path_only(render: Render, role: str) -> None:
    rendered = render({"model": {"uri": "/opt/models/qwen"}})
    assert rendered.env(role)["BATON_MODEL"] == "/opt/models/qwen"
    assert _volume(rendered, role) is None


@pytest.mark.parametrize(
    ("uri", "path"),
    [("pvc://models/a/b-1.5", "/models/a/b-1.5"), ("pvc://models", "/models"), ("pvc://models/a/", "/models/a")],
)
def test_a_claim_is_mounted_read_only(render: Render, uri: str, path: str) -> None:
    rendered = render({"model": {"uri": uri}})
    for role in ROLES:
        claim = {"claimName": "models", "readOnly": True}
        assert _volume(rendered, role) == {"name": "model", "persistentVolumeClaim": claim}
        assert _mount(rendered, role) == {"name": "model", "mountPath": "/models", "readOnly": True}
        assert rendered.env(role)["BATON_MODEL"] == path
        assert "initContainers" not in rendered.pod_spec(role)


def test_an_image_volume(render: Render) -> None:
    rendered = render({"model": {"uri": "oci://registry.example.com/m:1#/w"}, "image": {"pullPolicy": "Always"}})
    image = {"reference": "registry.example.com/m:1", "pullPolicy": "Always"}
    for role in ROLES:
        assert _volume(rendered, role) == {"name": "model", "image": image}
        assert rendered.env(role)["BATON_MODEL"] == "/models/w"
    assert problems(rendered.objects, rendered.hooks, versions=KUBERNETES_VERSIONS[1:]) == []


def _fetch(rendered: Rendered, role: str) -> tuple[Object, dict[str, Any]]:
    (container,) = rendered.pod_spec(role)["initContainers"]
    return container, {each["name"]: each["value"] for each in container["env"]}


def test_a_hub_model_is_downloaded_before_the_process_starts(render: Render) -> None:
    rendered = render({"model": {"uri": f"hf://org/Name-1.5@{COMMIT}"}})
    for role in ROLES:
        container, env = _fetch(rendered, role)
        assert container["image"] == rendered.container(role)["image"]
        assert (env["MODEL_REPOSITORY"], env["MODEL_REVISION"]) == ("org/Name-1.5", COMMIT)
        own = rendered.env(role)
        assert own["BATON_MODEL"] == env["MODEL_DIRECTORY"] == f"/models/org--Name-1.5--{COMMIT}"
        assert own["BATON_SERVED_MODEL_NAME"] == "org/Name-1.5"
        assert own["HF_HUB_OFFLINE"] == "1"
        # The gateway needs no weights.
        assert env["MODEL_FILES"] == ("tokenizer" if role == "gateway" else "all")
        mount = next(each for each in container["volumeMounts"] if each["name"] == "model")
        assert "readOnly" not in mount
        assert _mount(rendered, role) == {"name": "model", "mountPath": "/models", "readOnly": True}
    assert "fetch_model.py" in rendered.get("ConfigMap", "scripts")["data"]


def test_only_the_downloading_container_sees_the_hub_token(render: Render) -> None:
    rendered = render({"model": {"uri": f"hf://org/name@{COMMIT}", "hub": {"tokenSecret": "hub", "tokenKey": "t"}}})
    for role in ROLES:
        container, env = _fetch(rendered, role)
        assert env["HF_TOKEN_PATH"] == "/etc/baton/hub-token/token"
        assert any(each["name"] == "hub-token" for each in container["volumeMounts"])
        assert not any(each["name"] == "hub-token" for each in rendered.container(role)["volumeMounts"])
        volume = next(each for each in rendered.pod_spec(role)["volumes"] if each["name"] == "hub-token")
        assert volume["secret"]["items"] == [{"key": "t", "path": "token"}]


def test_downloads_may_be_kept_on_a_claim(render: Render) -> None:
    hub = {"claim": "downloads", "endpoint": "https://mirror.example.com"}
    rendered = render({"model": {"uri": f"hf://org/name@{COMMIT}", "hub": hub}})
    assert _volume(rendered, "decode") == {"name": "model", "persistentVolumeClaim": {"claimName": "downloads"}}
    assert _fetch(rendered, "decode")[1]["HF_ENDPOINT"] == "https://mirror.example.com"


@pytest.mark.parametrize(("revision", "warned"), [("main", True), (COMMIT, False)])
def test_a_revision_that_may_move_is_pointed_out(render: Render, revision: str, warned: bool) -> None:
    notes = render({"model": {"uri": f"hf://org/name@{revision}"}}).notes
    assert ("Pin the commit" in notes) is warned
