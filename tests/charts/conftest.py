"""Fixtures of the chart's tests."""

from __future__ import annotations

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


@pytest.fixture
def render(cluster: Cluster) -> Callable[..., Rendered]:
    """Installs the chart with the given values."""

    def install(values: dict[str, Any] | None = None, **options: Any) -> Rendered:
        return cluster.install(values or {}, **options)

    return install
