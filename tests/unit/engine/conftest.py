"""Each family's model is made once per session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.oracle import Subject, make_subject
from helpers.tiny_models import make_model_dir


@pytest.fixture(scope="session")
def get_subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """The model of a family, a key of ``helpers.tiny_models.FAMILIES``."""
    subjects: dict[str, Subject] = {}

    def get(family: str) -> Subject:
        if family not in subjects:
            subjects[family] = make_subject(family, tmp_path_factory.mktemp(family))
        return subjects[family]

    return get


@pytest.fixture
def llama(get_subject: Callable[[str], Subject]) -> Subject:
    return get_subject("llama")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir("llama", tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="module")
def pristine_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="150KB")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def sharded(pristine_sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_sharded, tmp_path / "model"))
