"""The other process of the plain socket loop: sends as many bytes of a mapping as it is told to, and nothing else."""

from __future__ import annotations

import socket
import sys

from baton.kvtransfer.mapping import create_mapping


def send(port: int, num_bytes: int, chunk_bytes: int, buffer_bytes: int) -> None:
    """Sends the whole mapping each time that a byte arrives, until the connection ends."""
    mapping, _, _ = create_mapping(num_bytes)
    view = memoryview(mapping)[:num_bytes]
    view[:] = bytes(range(256)) * (num_bytes // 256)
    with socket.socket() as connection:
        if buffer_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        connection.connect(("127.0.0.1", port))
        while connection.recv(1):
            for start in range(0, num_bytes, chunk_bytes):
                connection.sendall(view[start : start + chunk_bytes])


if __name__ == "__main__":
    send(*map(int, sys.argv[1:]))
