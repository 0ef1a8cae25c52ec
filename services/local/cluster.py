"""All processes of one installation on this machine: NATS, workers and gateway, as child processes."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Callable
from pathlib import Path

from baton.services.local.admin_door import URL_FILE, Installation
from baton.services.local.child import Child, ChildSpec, baton_argv
from baton.services.local.gateway_client import GatewayClient
from baton.services.local.nats_server import NatsServer
from baton.services.local.options import flags_for
from baton.services.local.private_directory import PrivateDirectory
from baton.services.runtime.admin_options import ADMIN_HOST
from baton.services.runtime.client_tls import own_context
from baton.services.runtime.cores import num_cores
from baton.services.runtime.net import free_port
from baton.services.runtime.settings import GatewaySettings, ServeSettings, WorkerSettings, is_loopback

Argv = Callable[..., list[str]]

_CLUSTER = "local"
_BLOCK_KEY_BYTES = 32


class LocalCluster:
    """What to run, with which options and secrets. Running it is the supervisor's part."""

    def __init__(self, settings: ServeSettings, *, argv: Argv = baton_argv) -> None:
        """``settings`` name their model. ``argv`` makes the command line of one of our processes."""
        host = settings.host
        self.settings = settings.model_copy(
            update={
                "port": settings.port or free_port(host),
                "grpc_port": settings.grpc_port or free_port(host),
                "admin_port": free_port(ADMIN_HOST) if settings.admin_port == 0 else settings.admin_port,
            }
        )
        self._directory = PrivateDirectory()
        self.directory = self._directory.path
        own_key = secrets.token_hex(32) if settings.needs_key else None
        self._nats_token = self._directory.write_secret("nats-token", secrets.token_hex(32).encode())
        self._block_key = self._directory.write_secret("block-key", secrets.token_bytes(_BLOCK_KEY_BYTES))
        self._key_files: list[Path] = []
        if own_key is not None:
            api_keys = [own_key, *(key.get_secret_value() for key in settings.api_key)]
            self._key_files = [self._directory.write_secret("api-keys", "\n".join(api_keys).encode())]
        self._admin_flags = self._make_admin_door()
        self._argv = argv
        self.nats = NatsServer(self.directory, self._nats_token)
        self.workers: list[Child] = []
        self.gateway: Child | None = None
        self.client = GatewayClient(
            self.settings.host, self.settings.port, api_key=own_key, timeout_s=2.0, tls=_own_tls(settings)
        )

    @property
    def worker_ids(self) -> list[str]:
        """Names of the workers: role and number."""
        settings = self.settings
        if settings.mode == "colocated":
            return [f"colocated-{i}" for i in range(settings.decode)]
        prefill = [f"prefill-{i}" for i in range(settings.prefill)]
        return prefill + [f"decode-{i}" for i in range(settings.decode)]

    @property
    def threads_per_worker(self) -> int:
        return self.settings.threads_per_worker or max(1, num_cores() // len(self.worker_ids))

    def make_children(self) -> None:
        """Once NATS has its address."""
        self.workers = [Child(self._worker(worker_id), self.directory) for worker_id in self.worker_ids]
        self.gateway = Child(self._gateway(), self.directory)

    def children(self) -> list[Child]:
        """All but NATS: those that can be restarted one by one."""
        return [*self.workers, *([self.gateway] if self.gateway is not None else [])]

    def remove_files(self) -> None:
        self._directory.remove()

    def _worker(self, worker_id: str) -> ChildSpec:
        role = worker_id.rpartition("-")[0]
        flags = flags_for(
            WorkerSettings,
            self.settings,
            **self._common(),
            # Only the gateway listens where the user said; workers and their blocks stay on this machine.
            host="127.0.0.1",
            allow_insecure_bind=False,
            port=0,
            worker_id=worker_id,
            threads_per_worker=self.threads_per_worker,
            role=None if role == "prefill" else role,
        )
        command = "prefill" if role == "prefill" else "decode"
        return ChildSpec(worker_id, self._argv(command, *flags), {"OMP_NUM_THREADS": str(self.threads_per_worker)})

    def _gateway(self) -> ChildSpec:
        key_files = [*self._key_files, *self.settings.api_key_file]
        flags = flags_for(GatewaySettings, self.settings, **self._common(), **self._admin_flags, api_key_file=key_files)
        return ChildSpec("gateway", self._argv("gateway", *flags), {"OMP_NUM_THREADS": "1"})

    def _make_admin_door(self) -> dict[str, object]:
        """Options of the gateway with which commands of this user find it (``admin_door``)."""
        settings, own_key, options = self.settings, None, {}
        if settings.admin_key_file is not None:  # who knows those keys also knows where to use them
            return {}
        if settings.admin_port is None:
            if not settings.needs_key and settings.ssl_certfile is None and is_loopback(settings.host):
                return {}  # the public port is open to this user as it is
            own_key = secrets.token_hex(32)
            options = {"admin_port": 0, "admin_key_file": self._directory.write_secret("admin-key", own_key.encode())}
        Installation(settings.host, settings.port, own_key).leave_note(self._directory)
        return {**options, "admin_url_file": self.directory / URL_FILE}

    def _common(self) -> dict[str, object]:
        return {
            "cluster": _CLUSTER,
            "nats_url": self.nats.url,
            "nats_token_file": self._nats_token,
            "block_key_file": self._block_key,
        }


def _own_tls(settings: ServeSettings) -> Callable[[], ssl.SSLContext] | None:
    """How to ask the gateway: its certificate is one of our own files."""
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    if certificate is None or key is None:
        return None
    return lambda: own_context(certificate, key)
