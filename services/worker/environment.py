"""What a worker process takes from the world around it, in one place, so that a simulation can give it another world."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc

from baton.kvtransfer.transport.sockets import SYSTEM_SOCKETS, Sockets
from baton.kvtransfer.transport.tls import Shown, TLSIdentity, TLSSockets
from baton.services.core.router import Role
from baton.services.runtime import grpc as runtime_grpc
from baton.services.runtime.certificates import peer_of
from baton.services.runtime.peers import WORKER, WORKER_NAME, refusal
from baton.services.runtime.sparingly import Sparingly
from baton.services.runtime.tls import TLSFiles
from baton.services.worker.step_loop import StepLoop


@dataclass(frozen=True, slots=True)
class Environment:
    """Time, identity, network, and where steps run. The defaults are the real ones."""

    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time  # seconds since 1970; to tell which of two processes began later
    new_incarnation: Callable[[], str] = lambda: uuid.uuid4().hex
    create_server: Callable[[], grpc.aio.Server] = runtime_grpc.create_server
    open_channel: Callable[[str], grpc.aio.Channel] = runtime_grpc.create_channel
    sockets: Sockets = SYSTEM_SOCKETS
    step_loop: type[StepLoop[Any]] = StepLoop
    # How a worker becomes one of another role, within so many seconds. None: it cannot.
    change_role: Callable[[Role, float], None] | None = None
    # How a stuck worker ends its process. None: nobody watches, as where several workers share one.
    end_process: Callable[[int], None] | None = None
    tls: TLSFiles | None = None  # None: connections to and from other processes are plain

    def secured(self, tls: TLSFiles | None) -> Environment:
        """The same, with gRPC and the data plane under TLS. None: as it is."""
        if tls is None:
            return self
        return replace(
            self,
            tls=tls,
            create_server=partial(runtime_grpc.create_internal_server, tls),
            open_channel=partial(runtime_grpc.create_channel, tls=tls),
            sockets=TLSSockets(data_plane_identity(tls)),
        )


def data_plane_identity(tls: TLSFiles) -> TLSIdentity:
    """Workers on both ends."""
    log = Sparingly()

    def why_not(shown: Shown) -> str | None:
        peer = peer_of([str(name) for kind, name in shown.get("subjectAltName", ()) if kind == "URI"])
        return refusal(peer, tls.current.certificate.peer.trust_domain, frozenset({WORKER}))

    def on_refused(address: str, reason: str) -> None:
        log.warn("tls_peer_refused", f"{address} {reason}", peer=address, listener="KV data plane", reason=reason)

    return TLSIdentity(
        server=lambda: tls.current.server,
        client=lambda: tls.current.client,
        server_name=WORKER_NAME,
        refusal=why_not,
        on_refused=on_refused,
    )
