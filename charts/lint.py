"""Lints the chart with Helm over its defaults and each file of examples/values-*.yaml; part of `make check`.

Helm's lint takes no values, so each set is merged into a copy of the chart. Its Python binding names the file and the
severity of a finding but not its text, so values are also held against the schema here, and tests/charts render the chart,
where Helm's messages are whole.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CHART = Path(__file__).parent / "baton"
_SEVERITIES = {1: "info", 2: "warning", 3: "error"}
_WARNING = 2


def merge(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``values`` over ``defaults`` as Helm merges them: sections merge, null removes, everything else replaces."""
    merged = dict(defaults)
    for key, value in values.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def value_sets(chart: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and whole values of every set that is linted."""
    defaults = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    yield "values.yaml", defaults
    for path in sorted((chart / "examples").glob("values-*.yaml")):
        yield path.name, merge(defaults, yaml.safe_load(path.read_text(encoding="utf-8")))


def findings(chart: Path, values: dict[str, Any]) -> list[str]:
    """What is wrong with ``chart`` under ``values``, one line each."""
    schema = json.loads((chart / "values.schema.json").read_text(encoding="utf-8"))
    errors = jsonschema.Draft7Validator(schema).iter_errors(values)
    found = [f"values: {error.json_path}: {error.message}" for error in errors]
    with tempfile.TemporaryDirectory(prefix="baton-lint-") as directory:
        copy = Path(directory) / chart.name
        shutil.copytree(chart, copy)
        (copy / "values.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        result = asyncio.run(_helm_lint(copy))
    for message in result["Messages"] or []:
        if message["Severity"] >= _WARNING:
            found.append(f"helm lint: {_SEVERITIES[message['Severity']]} in {message['Path']}")
    return found


async def _helm_lint(chart: Path) -> dict[str, Any]:
    import helm_sdkpy  # loads a large library, which reads the environment only then

    # Lint calls no cluster, but a configuration must name one.
    cluster = {"name": "none", "cluster": {"server": "http://127.0.0.1:1"}}
    context = {"name": "none", "context": {"cluster": "none", "user": "none"}}
    kubeconfig = yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [cluster],
            "users": [{"name": "none", "user": {}}],
            "contexts": [context],
            "current-context": "none",
        }
    )
    with helm_sdkpy.Configuration(namespace="lint", kubeconfig=kubeconfig) as configuration:
        result: dict[str, Any] = await helm_sdkpy.Lint(configuration).run(str(chart))
    return result


def main() -> int:
    """Returns the exit status."""
    try:
        import helm_sdkpy  # noqa: F401
    except ImportError as error:
        print(
            f"charts/lint.py needs helm-sdkpy: pip install --ignore-requires-python helm-sdkpy ({error})",
            file=sys.stderr,
        )
        return 1
    failed = False
    with tempfile.TemporaryDirectory(prefix="baton-helm-") as home:
        os.environ.update({f"HELM_{name}_HOME": home for name in ("CACHE", "CONFIG", "DATA")})
        for name, values in value_sets(CHART):
            for finding in findings(CHART, values):
                failed = True
                print(f"{name}: {finding}", file=sys.stderr)
    if not failed:
        print("charts/baton: no findings")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
