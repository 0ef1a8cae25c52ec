"""How commands of the user who runs ``baton serve`` find the admin listener and its key: in files for this user alone.

``baton serve`` says in its private directory which gateway it runs and with which key; the gateway itself says there where
it listens for operators, once it does. ``baton drain`` looks there first. Nobody else can read it, or have it believed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from baton.services.local.private_directory import PrivateDirectory, directories_in_use
from baton.services.runtime.settings import is_loopback, is_wildcard

URL_FILE = "admin-url"
_NOTE = "installation.json"


@dataclass(frozen=True, slots=True)
class Installation:
    """``host`` and ``port`` as its users know them. ``admin_key`` None: its admin listener asks for none."""

    host: str
    port: int
    admin_key: str | None

    def leave_note(self, directory: PrivateDirectory) -> None:
        directory.write_secret(_NOTE, json.dumps(asdict(self)).encode())

    def is_meant(self, host: str, port: int) -> bool:
        """Whether a URL with these names it, on this machine."""
        if port != self.port:
            return False
        return host == self.host or (is_loopback(host) and (is_loopback(self.host) or is_wildcard(self.host)))


@dataclass(frozen=True, slots=True)
class AdminDoor:
    """Where operators ask, and with what."""

    url: str
    key: str | None


def find_admin_door(url: str) -> AdminDoor | None:
    """That of the installation whose REST API is at ``url``, if this user runs it on this machine."""
    try:
        split = urlsplit(url)
        host, port = split.hostname or "", split.port or (443 if split.scheme == "https" else 80)
    except ValueError:  # whoever asks there says so
        return None
    for directory in directories_in_use():
        try:
            installation = Installation(**json.loads((directory / _NOTE).read_bytes()))
            admin_url = (directory / URL_FILE).read_text(encoding="ascii").strip()
        except (OSError, ValueError, TypeError):  # it starts, or ends, or is of another release
            continue
        if admin_url and installation.is_meant(host, port):
            return AdminDoor(admin_url, installation.admin_key)
    return None
