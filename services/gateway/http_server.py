"""An HTTP server inside the gateway's process, which has its own ideas of signals and of the end."""

from __future__ import annotations

import asyncio
import socket
from contextlib import nullcontext
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from baton.services.gateway.tls_door import TLSDoor, asking_for_certificates
from baton.services.runtime.tls import TLSFiles


class HttpServer:
    """Serves an application on a listener from the moment when it is made. ``task`` ends with the server."""

    def __init__(
        self, app: ASGIApp, listener: socket.socket, name: str, max_header_bytes: int, tls: TLSFiles | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=75,
            h11_max_incomplete_event_size=max_header_bytes,
            # A drain waits for streams itself, and then cuts off what is left.
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config) if tls is None else _TLSServer(config, tls)
        self.task = asyncio.create_task(self._server.serve(sockets=[listener]), name=name)

    async def stop(self) -> None:
        self._server.should_exit = True
        await asyncio.gather(self.task, return_exceptions=True)  # whoever waits for a failure was told of it


class _Server(uvicorn.Server):
    """Signals belong to the process, not to its HTTP servers."""

    def capture_signals(self):  # type: ignore[no-untyped-def]
        return nullcontext()


class _TLSServer(_Server):
    """Uvicorn's own TLS keeps the certificates of its start, waits a minute for a handshake, and is silent when one fails."""

    def __init__(self, config: uvicorn.Config, tls: TLSFiles) -> None:
        super().__init__(config)
        self._tls = tls

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        protocol: Any = self.config.http_protocol_class
        if self._tls.ca is not None:
            protocol = asking_for_certificates(protocol)
        make = partial(protocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        doors: list[Any] = [TLSDoor(listener, self._tls, make) for listener in sockets or ()]
        self.servers = doors  # what is asked of them at the end is that they close
