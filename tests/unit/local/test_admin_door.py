"""How ``baton drain`` finds the operators' listener of an installation of the same user, and nobody else's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from baton.services.local import private_directory
from baton.services.local.admin_door import URL_FILE, AdminDoor, Installation, find_admin_door
from baton.services.local.private_directory import PrivateDirectory

DOOR = AdminDoor("http://127.0.0.1:9", "key")


@pytest.fixture(autouse=True)
def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(private_directory.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def installed(host: str = "127.0.0.1", port: int = 8000) -> PrivateDirectory:
    directory = PrivateDirectory()
    Installation(host, port, "key").leave_note(directory)
    (directory.path / URL_FILE).write_text("http://127.0.0.1:9\n")
    return directory


@pytest.mark.parametrize(
    ("host", "url", "is_found"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000", True),
        ("127.0.0.1", "https://localhost:8000", True),
        ("localhost", "http://[::1]:8000/v1", True),
        ("0.0.0.0", "http://localhost:8000", True),
        ("10.0.0.7", "http://10.0.0.7:8000", True),
        ("10.0.0.7", "http://127.0.0.1:8000", False),
        ("127.0.0.1", "http://10.0.0.7:8000", False),
        ("0.0.0.0", "http://llm.example.com:8000", False),
        ("127.0.0.1", "http://127.0.0.1:8001", False),
        ("127.0.0.1", "http://127.0.0.1", False),
        ("127.0.0.1", "http://127.0.0.1:nonsense", False),
        ("127.0.0.1", "nowhere", False),
    ],
)
def test_the_url_of_its_rest_api_names_it(host: str, url: str, is_found: bool) -> None:
    directory = installed(host)
    assert find_admin_door(url) == (DOOR if is_found else None)
    directory.remove()
    assert find_admin_door(url) is None


def test_the_note_is_for_this_user_alone() -> None:
    directory = installed()
    assert (directory.path / "installation.json").stat().st_mode & 0o777 == 0o600
    directory.remove()


def test_of_several_the_one_with_that_port_is_found() -> None:
    others = [installed(port=8001), installed(port=8002)]
    assert find_admin_door("http://127.0.0.1:8002") == DOOR
    assert find_admin_door("http://127.0.0.1:8000") is None
    for other in others:
        other.remove()


def test_one_that_ended_or_is_not_there_yet_is_not_asked() -> None:
    directory = installed()
    (directory.path / URL_FILE).write_text("")
    assert find_admin_door("http://127.0.0.1:8000") is None
    (directory.path / URL_FILE).unlink()
    assert find_admin_door("http://127.0.0.1:8000") is None
    (directory.path / URL_FILE).write_text("http://127.0.0.1:9")
    for note in ("{", "[]", json.dumps({"host": "127.0.0.1"})):
        (directory.path / "installation.json").write_text(note)
        assert find_admin_door("http://127.0.0.1:8000") is None
    Installation("127.0.0.1", 8000, "key").leave_note(directory)
    assert find_admin_door("http://127.0.0.1:8000") == DOOR
    os.close(directory._lock)  # as when its process was killed
    assert find_admin_door("http://127.0.0.1:8000") is None


def test_what_others_put_there_is_not_believed(temporary_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = installed()
    elsewhere = temporary_directory / "elsewhere"
    directory.path.rename(elsewhere)
    directory.path.symlink_to(elsewhere)
    assert find_admin_door("http://127.0.0.1:8000") is None
    directory.path.unlink()
    elsewhere.rename(directory.path)
    assert find_admin_door("http://127.0.0.1:8000") == DOOR
    monkeypatch.setattr(private_directory.os, "getuid", lambda: os.stat(directory.path).st_uid + 1)
    assert find_admin_door("http://127.0.0.1:8000") is None
    directory.remove()
