"""The key of block names comes from the file; without one it still keeps clusters apart."""

from __future__ import annotations

import secrets
from pathlib import Path

from baton.services.runtime.block_key import read_block_key
from baton.services.runtime.settings import BusSettings
from baton.services.runtime.settings_loader import load_settings


def test_the_files_bytes_are_the_key(tmp_path: Path) -> None:
    key = secrets.token_bytes(32)
    file = tmp_path / "key"
    file.write_bytes(key)
    assert read_block_key(load_settings(BusSettings, {"block_key_file": str(file)})) == key


def test_without_a_file_the_clusters_name_makes_it() -> None:
    east, west = (read_block_key(load_settings(BusSettings, {"cluster": name})) for name in ("east", "west"))
    assert east != west
    assert east == read_block_key(load_settings(BusSettings, {"cluster": "east"}))
    assert 16 <= len(east) <= 64
