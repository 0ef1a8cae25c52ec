"""An HTTP server inside the gateway's process, which has its own ideas of signals and of the end."""

from __future__ import annotations

import asyncio
import socket
from contextlib import nullcontext

import uvicorn
from starlette.types import ASGIApp


class HttpServer:
    """Serves an application on a listener from the moment when it is made. ``task`` ends with the server."""

    def __init__(self, app: ASGIApp, listener: socket.socket, name: str, max_header_bytes: int) -> None:
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
        self._server = _Server(config)
        self.task = asyncio.create_task(self._server.serve(sockets=[listener]), name=name)

    async def stop(self) -> None:
        self._server.should_exit = True
        await asyncio.gather(self.task, return_exceptions=True)  # whoever waits for a failure was told of it


class _Server(uvicorn.Server):
    """Signals belong to the process, not to its HTTP servers."""

    def capture_signals(self):  # type: ignore[no-untyped-def]
        return nullcontext()
