"""Sockets and addresses."""

from __future__ import annotations

import errno
import os
import socket

from baton.services.core.errors import ConfigurationError

# Connections that the kernel keeps while the event loop is busy with a step of accepting.
_BACKLOG = 2048


def format_address(host: str, port: int) -> str:
    """``host:port``, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket on ``host:port``; port 0 takes any free one. Raises ConfigurationError if it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigurationError(f"cannot listen on {format_address(host, port)}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
        raise ConfigurationError(f"cannot listen on {format_address(host, port)}: {reason}") from None
    return listener


def port_problem(host: str, port: int, option: str) -> str | None:
    """Why ``port`` cannot be listened on now, in one line naming ``option``; None when it can.

    Another process may still take it before it is used: this is for telling all problems at once, not for being sure.
    """
    try:
        bind_listener(host, port).close()
    except ConfigurationError as error:
        return f"{option}: {error.message}"
    return None


def free_port(host: str) -> int:
    """A port that is free now."""
    with bind_listener(host, 0) as listener:
        return int(listener.getsockname()[1])
