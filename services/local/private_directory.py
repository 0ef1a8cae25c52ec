"""A directory for secrets and sockets of one installation, gone with it, at the latest when the next one starts."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "baton-serve-"
_LOCK = "lock"
# One this young may not have its lock yet.
_MIN_AGE_S = 60.0


class PrivateDirectory:
    """Readable by this user only. A lock, which ends with the process however it ends, marks it as in use."""

    def __init__(self) -> None:
        for abandoned in abandoned_directories():
            shutil.rmtree(abandoned, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def write_secret(self, name: str, content: bytes) -> Path:
        """A file that only this user can read."""
        path = self.path / name
        path.touch(mode=0o600)
        path.write_bytes(content)
        return path

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def abandoned_directories() -> Iterator[Path]:
    """What killed processes of this user could not remove themselves. Locked while the caller looks at it."""
    for directory, lock in _own_directories(min_age_s=_MIN_AGE_S):
        if _could_lock(lock, fcntl.LOCK_EX):
            yield directory


def directories_in_use() -> Iterator[Path]:
    """Those of this user's installations that run."""
    for directory, lock in _own_directories(min_age_s=0.0):
        if not _could_lock(lock, fcntl.LOCK_SH):
            yield directory


def _own_directories(min_age_s: float) -> Iterator[tuple[Path, int]]:
    """Each with its lock, open while the caller looks at it."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():  # not ours to judge
                continue
            if time.time() - status.st_mtime < min_age_s:
                continue
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # another process was faster
            continue
        try:
            yield directory, lock
        finally:
            os.close(lock)


def _could_lock(lock: int, kind: int) -> bool:
    """Whether it could be locked by us: nobody else uses it."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
