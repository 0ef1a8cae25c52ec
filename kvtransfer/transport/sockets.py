"""Where the data plane gets its sockets from: the system, unless somebody simulates one."""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

_BACKLOG = 128


class Sockets(Protocol):
    """Makes stream sockets that do not block."""

    def listen(self, host: str, port: int) -> socket.socket:
        """A listening socket; port 0 is any free one. Raises OSError."""
        ...

    async def connect(self, host: str, port: int) -> socket.socket:
        """A connected socket. Raises OSError."""
        ...


class SystemSockets:
    """The system's own, over IPv4 and IPv6."""

    def listen(self, host: str, port: int) -> socket.socket:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.create_server(info[4][:2], family=info[0], backlog=_BACKLOG)
        sock.setblocking(False)
        return sock

    async def connect(self, host: str, port: int) -> socket.socket:
        loop = asyncio.get_running_loop()
        error: OSError = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, address)
            except OSError as failure:
                sock.close()
                error = failure
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise error


SYSTEM_SOCKETS = SystemSockets()
