"""The way into REST under TLS: shakes hands with who connects, then hands the connection to HTTP.

Handshakes are bounded in time and in number, and one that fails is a line in the log. A client without a certificate, where
clients need one, finds only what probes ask for.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.auth import OPEN_PATHS
from baton.services.gateway.errors import public_error
from baton.services.runtime.sparingly import Sparingly
from baton.services.runtime.tls import TLSFiles

_HANDSHAKE_TIMEOUT_S = 10.0
_MAX_NUM_HANDSHAKES = 512
# Pause after the system refused us a descriptor: it will not have one a moment later.
_ACCEPT_PAUSE_S = 0.1


class TLSDoor:
    """Accepts on ``listener`` until ``close``. ``make_protocol`` makes what speaks on a connection."""

    def __init__(self, listener: socket.socket, tls: TLSFiles, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._listener = listener
        self._tls = tls
        self._make_protocol = make_protocol
        self._greeting: dict[socket.socket, asyncio.Task[None]] = {}  # those that shake hands, oldest first
        self._log = Sparingly()
        self._accepting = asyncio.create_task(self._accept(), name="tls-accept")

    def close(self) -> None:
        """Nobody else comes in."""
        self._accepting.cancel()
        for sock in self._greeting:
            _hang_up(sock)

    async def wait_closed(self) -> None:
        await asyncio.gather(self._accepting, *self._greeting.values(), return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError:
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if len(self._greeting) >= _MAX_NUM_HANDSHAKES:
                # Whoever means it has had time: so many idle connections keep nobody out.
                _hang_up(next(iter(self._greeting)))
            task = asyncio.create_task(self._greet(sock), name="tls-handshake")
            self._greeting[sock] = task
            task.add_done_callback(partial(self._greeted, sock))

    def _greeted(self, sock: socket.socket, _: asyncio.Task[None]) -> None:
        del self._greeting[sock]

    async def _greet(self, sock: socket.socket) -> None:
        address = sock.getpeername()[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else "local"
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make_protocol,
                sock,
                ssl=self._tls.current.server,
                ssl_handshake_timeout=_HANDSHAKE_TIMEOUT_S,
            )
        except (OSError, EOFError) as error:  # SSLError is one
            reason = _in_words(error)
            self._log.warn("tls_peer_refused", f"{address} {reason}", peer=address, listener="REST", reason=reason)


def _hang_up(sock: socket.socket) -> None:
    """Who owns the connection sees it end, and lets go of it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def asking_for_certificates(protocol: type[Any]) -> type[Any]:
    """The protocol, for which an application without certificates is another one."""

    class Asking(protocol):  # type: ignore[misc]  # whichever uvicorn chose
        app: ASGIApp

        def connection_made(self, transport: Any) -> None:
            if not transport.get_extra_info("ssl_object").getpeercert():
                self.app = WithoutCertificate(self.app)
            super().connection_made(transport)

    return Asking


class WithoutCertificate:
    """What the application is to a client that shows no certificate."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        message = "This server asks its clients for a certificate. Show one of the CA that it was given for them."
        error = public_error(BatonError(ErrorCode.UNAUTHENTICATED, message))
        await error.response(scope["path"])(scope, receive, send)


def _in_words(error: OSError | EOFError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        if error.reason in ("HTTP_REQUEST", "WRONG_VERSION_NUMBER"):
            return f"the client does not speak TLS; its URL has to begin with https:// ({reason})"
        return f"the handshake failed: {reason}"
    return f"the client did not finish the handshake: {str(error) or type(error).__name__}"
