"""Fixtures of the chart's tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.charts.fake_kubernetes import FakeKubernetes
from tests.charts.render import Cluster, Rendered


@pytest.fixture(scope="session", autouse=True)
def helm_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Helm's library reads the environment once, when it is loaded: at the first configuration."""
    home = tmp_path_factory.mktemp("helm")
    os.environ.update({f"HELM_{name}_HOME": str(home) for name in ("CACHE", "CONFIG", "DATA")})
    return home


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """An empty cluster."""
    with FakeKubernetes() as api:
        yield Cluster(api)


@pytest.fixture(scope="session")
def render() -> Callable[..., Rendered]:
    """Installs the chart with the given values into a cluster of its own. Not to be changed: equal values share a result."""
    known: dict[str, Rendered] = {}

    def install(values: dict[str, Any] | None = None, **options: Any) -> Rendered:
        key = json.dumps([values or {}, options], sort_keys=True)
        if key not in known:
            with FakeKubernetes() as api:
                known[key] = Cluster(api).install(values or {}, **options)
        return known[key]

    return install
