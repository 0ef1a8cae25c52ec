"""Renders the chart by installing it into the fake API server: helm-sdkpy has no template command."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helm_sdkpy
import yaml

from tests.charts.fake_kubernetes import FakeKubernetes, Object

CHART = Path(__file__).parents[2] / "charts" / "baton"
EXAMPLES = CHART / "examples"
NAMESPACE = "serving"
_GENERATED = re.compile(r"^(  (?:block-key|nats-token): ).*$", re.MULTILINE)
_SCRIPT = re.compile(r"^(  \w+\.py: \|)\n(?:(?:    .*)?\n)+", re.MULTILINE)


@dataclass(frozen=True)
class Rendered:
    """What an installation put into the cluster, by the server, and Helm's record of it."""

    objects: list[Object]  # stored by the server; Helm's own Secrets left out
    hooks: list[Object]  # Helm makes these when their time comes, so they come from the record
    manifest: str
    notes: str

    def get(self, kind: str, name: str) -> Object:
        """The object of this kind whose name ends in ``name``; KeyError unless there is exactly one."""
        found = [
            each for each in self.objects if each["kind"] == kind and each["metadata"]["name"].endswith(f"-{name}")
        ]
        if len(found) != 1:
            raise KeyError(f"{len(found)} objects are a {kind} named *-{name}")
        return found[0]

    def pod_spec(self, component: str) -> Object:
        spec: Object = self.get("Deployment", component)["spec"]["template"]["spec"]
        return spec

    def container(self, component: str) -> Object:
        container: Object = self.pod_spec(component)["containers"][0]
        return container

    def env(self, component: str) -> dict[str, Any]:
        """Variables of a component's container: their text, or where it comes from."""
        return {each["name"]: each.get("value", each.get("valueFrom")) for each in self.container(component)["env"]}


@dataclass
class Cluster:
    """Helm against one fake API server."""

    api: FakeKubernetes
    namespace: str = NAMESPACE
    _configuration: Any = field(init=False)

    def __post_init__(self) -> None:
        self._configuration = helm_sdkpy.Configuration(namespace=self.namespace, kubeconfig=self.api.kubeconfig)

    def install(self, values: dict[str, Any], release: str = "demo", chart: Path = CHART) -> Rendered:
        """Raises helm_sdkpy.InstallError for values that the schema or the templates refuse."""
        action = helm_sdkpy.Install(self._configuration)
        return self._rendered(
            asyncio.run(action.run(release, str(chart), values, wait=False, server_side_apply=True, timeout=30))
        )

    def upgrade(self, values: dict[str, Any], release: str = "demo", chart: Path = CHART) -> Rendered:
        action = helm_sdkpy.Upgrade(self._configuration)
        return self._rendered(
            asyncio.run(action.run(release, str(chart), values, wait=False, server_side_apply=True, timeout=30))
        )

    def uninstall(self, release: str = "demo") -> None:
        asyncio.run(helm_sdkpy.Uninstall(self._configuration).run(release, wait=False, timeout=30))

    def stored(self) -> list[Object]:
        """All objects but Helm's own."""
        return [each for each in self.api.objects.values() if each.get("type") != "helm.sh/release.v1"]

    def _rendered(self, release: dict[str, Any]) -> Rendered:
        return Rendered(
            objects=self.stored(),
            hooks=[yaml.safe_load(hook["manifest"]) for hook in release.get("hooks") or []],
            manifest="".join(
                [release["manifest"], *(f"---\n{hook['manifest']}\n" for hook in release.get("hooks") or [])]
            ),
            notes=release["info"]["notes"],
        )


def stable_manifest(rendered: Rendered) -> str:
    """The manifest and the notes for comparison with a file: without what is random, and without the chart's scripts."""
    text = _GENERATED.sub(r"\1Z2VuZXJhdGVk", rendered.manifest)
    text = _SCRIPT.sub(r"\1\n    # as in files/\n", text)
    lines = [line.rstrip() for line in text.splitlines()]
    notes = [f"# {line}".rstrip() for line in rendered.notes.strip().splitlines()]
    return "\n".join(["# Notes that Helm shows:", *notes, *(line for line in lines if line), ""])
