"""Each family's model is made once per session."""

from __future__ import annotations

from collections.abc import Callable

import pytest
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


@pytest.fixture
def llama(get_subject: Callable[[str], Subject]) -> Subject:
    return get_subject("llama")
