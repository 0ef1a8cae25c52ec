"""Each file of examples/ installs, every object that it makes is valid, and what it renders to is kept beside it.

After a wanted change: BATON_WRITE_RENDERED=1 pytest tests/charts/test_examples.py, and read the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.charts.render import EXAMPLES, Rendered, stable_manifest
from tests.charts.validate import KUBERNETES_VERSIONS, problems

# What the examples' comments tell the user to have.
EXISTING = {
    "minimal": [],
    "cpu-demo": [],
    "gpu-hub": ["Secret/registry-login", "Secret/hub-token", "Secret/baton-api-keys"],
    "gpu-pvc": ["Secret/baton-block-key", "Secret/baton-api-keys", "PersistentVolumeClaim/models"],
    "external-nats": ["Secret/baton-block-key", "Secret/nats-client", "ServiceAccount/serving"],
}
# Where an image volume is known.
VERSIONS = {"external-nats": KUBERNETES_VERSIONS[1:]}


def _values(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((EXAMPLES / f"values-{name}.yaml").read_text(encoding="utf-8")))


def test_every_example_is_tested() -> None:
    assert {path.stem.removeprefix("values-") for path in EXAMPLES.glob("values-*.yaml")} == set(EXISTING)
    assert {path.stem.removeprefix("rendered-") for path in EXAMPLES.glob("rendered-*.yaml")} == set(EXISTING)


@pytest.mark.parametrize("name", EXISTING)
def test_example_is_valid_and_rendered_as_kept(render: Callable[..., Rendered], name: str) -> None:
    rendered = render(_values(name))
    versions = VERSIONS.get(name, KUBERNETES_VERSIONS)
    assert problems(rendered.objects, rendered.hooks, frozenset(EXISTING[name]), versions) == []
    hooks = [hook["metadata"]["name"] for hook in rendered.hooks]
    manifest = [
        each for each in yaml.safe_load_all(rendered.manifest) if each and each["metadata"]["name"] not in hooks
    ]
    assert _by_name(rendered.objects) == _by_name(manifest)
    kept = EXAMPLES / f"rendered-{name}.yaml"
    if os.environ.get("BATON_WRITE_RENDERED"):
        kept.write_text(stable_manifest(rendered), encoding="utf-8")
    assert stable_manifest(rendered) == kept.read_text(encoding="utf-8")


def _by_name(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Without Helm's marks on the objects."""
    own = {
        f"{each['kind']}/{each['metadata']['name']}": {**each, "metadata": dict(each["metadata"])} for each in objects
    }
    for each in own.values():
        marks = each["metadata"].get("annotations", {})
        kept = {key: value for key, value in marks.items() if not key.startswith("meta.helm.sh/")}
        each["metadata"]["annotations"] = kept
    return own
