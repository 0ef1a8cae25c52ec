"""Directories of installations: private, and cleared away after a kill, but never from under a living one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.services.local import private_directory
from baton.services.local.private_directory import PrivateDirectory


@pytest.fixture(autouse=True)
def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(private_directory.tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def abandoned(temporary_directory: Path) -> Path:
    """The directory of a process that was killed, old enough to be judged."""
    code = (
        "import os, tempfile; tempfile.tempdir = os.environ['T'];"
        "from baton.services.local.private_directory import PrivateDirectory as P;"
        "d = P(); d.write_secret('key', b'k'); print(d.path, flush=True); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "T": str(temporary_directory)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    path = Path(run.stdout.strip())
    assert (path / "key").exists()
    os.utime(path, (0, 0))
    return path


def test_it_and_its_secrets_are_for_this_user_only() -> None:
    directory = PrivateDirectory()
    secret = directory.write_secret("key", b"k")
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.read_bytes() == b"k"
    directory.remove()
    assert not directory.path.exists()


def test_the_next_one_removes_what_a_killed_process_left(abandoned: Path) -> None:
    PrivateDirectory().remove()
    assert not abandoned.exists()


def test_a_living_ones_directory_stays(temporary_directory: Path) -> None:
    living = PrivateDirectory()
    os.utime(living.path, (0, 0))
    PrivateDirectory().remove()
    assert living.path.exists()
    living.remove()


def test_a_young_one_and_anything_else_stays(abandoned: Path, temporary_directory: Path) -> None:
    os.utime(abandoned)
    other = temporary_directory / "baton-serve-notes"
    other.mkdir()
    os.utime(other, (0, 0))
    link = temporary_directory / "baton-serve-link"
    link.symlink_to(other)
    PrivateDirectory().remove()
    assert abandoned.exists()
    assert other.exists()
    assert link.is_symlink()
