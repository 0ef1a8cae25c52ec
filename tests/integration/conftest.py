"""Models and keys that the integration tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cluster import BLOCK_KEY
from helpers.oracle import Subject, make_subject


@pytest.fixture(scope="session")
def get_subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """The model of a family, a key of ``helpers.tiny_models.FAMILIES``."""
    subjects: dict[str, Subject] = {}

    def get(family: str) -> Subject:
        if family not in subjects:
            subjects[family] = make_subject(family, tmp_path_factory.mktemp(family))
        return subjects[family]

    return get


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "block-key"
    path.write_bytes(BLOCK_KEY)
    return path
