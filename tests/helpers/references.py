"""References to tests in catalogues: "file::name", where a chaos scenario's file is YAML."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def assert_exists(reference: str) -> None:
    """Fails unless the file has the test."""
    file, name = reference.split("::")
    pattern = rf"^name: {name}$" if file.endswith(".yaml") else rf"^(async )?def {name}\("
    assert re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE), reference
