"""A directory for secrets and sockets of one installation, gone with it, at the latest when the next one starts."""

from __future__ import annotations

import fcntl
import os
import shutil
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
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            status = directory.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _MIN_AGE_S or directory.is_symlink():
                continue
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # another process was faster, or it is not ours to judge
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use
            continue
        else:
            yield directory
        finally:
            os.close(lock)
