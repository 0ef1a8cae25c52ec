"""Which process has the other end of a connection on this machine.

The kernel is asked about that one connection: its tables in /proc, read whole for each one, take too long on a busy machine.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBBI")  # struct inet_diag_req_v2, before the socket's identity
_IDENTITY_BYTES = 48
_INODE_AT = _HEADER.size + 4 + _IDENTITY_BYTES + 16  # in struct inet_diag_msg


def owner_of(port: int, peer_port: int, pids: Iterable[int]) -> int | None:
    """The one of ``pids`` that holds the end with ``port`` of a loopback connection. None: nobody, or not any more."""
    inode = _inode_of(port, peer_port)
    return next((pid for pid in pids if inode and _holds(pid, inode)), None)


def _inode_of(port: int, peer_port: int) -> int:
    """The socket's number, 0 when there is none."""
    loopback = socket.inet_aton("127.0.0.1") + bytes(12)
    identity = struct.pack("!HH", port, peer_port) + loopback + loopback + struct.pack("=Iq", 0, -1)
    request = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + identity
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
        kernel.send(header + request)
        answer = kernel.recv(4096)
    if _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:  # an error: no such connection
        return 0
    return int(struct.unpack_from("=I", answer, _INODE_AT)[0])


def _holds(pid: int, inode: int) -> bool:
    name = f"socket:[{inode}]"
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if os.readlink(descriptor) == name:
                    return True
    return False
