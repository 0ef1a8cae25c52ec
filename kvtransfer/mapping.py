"""Memory that another process of the same user on the same host can map, and proof on both sides that it is the right one.

The owner makes a memfd: it has no name in any file system, so nothing is left behind however the process ends. A peer opens it
as /proc/PID/fd/FD, which the kernel allows to the same user only. A pid and a number alone prove nothing (both are
reused), so the mapping ends with a trailer that holds a random nonce, told in the handshake. The memfd is sealed against
shrinking: without the seal its owner could truncate it and kill a reader by SIGBUS.
"""

from __future__ import annotations

import fcntl
import hmac
import mmap
import os
import secrets
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from baton.kvtransfer.errors import TransferCode, TransferError

_TRAILER = struct.Struct("<8s16sQ")  # magic, nonce, bytes before the trailer
_MAGIC = b"BATONKV1"
_NAME = "baton-kv"  # shown as /memfd:baton-kv in /proc
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Where a process of the same user on the same host can open a mapping: a descriptor of the process that owns it."""

    pid: int
    fd: int
    num_bytes: int
    nonce: bytes  # 16 random bytes


def host_id() -> str:
    """Random id of this boot of this host; empty where there is none. Processes with equal ids may be able to share memory."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def create_mapping(num_bytes: int) -> tuple[mmap.mmap, int | None, SharedMemory | None]:
    """Zeroed memory, the descriptor that peers open, and what they must be told. None where memory cannot be shared."""
    if num_bytes < 1:
        raise ValueError(f"a mapping of {num_bytes} bytes")
    if sys.platform != "linux":
        return mmap.mmap(-1, num_bytes), None, None
    nonce = secrets.token_bytes(16)
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes + _TRAILER.size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        mapping = mmap.mmap(fd, num_bytes + _TRAILER.size)
    except OSError:
        os.close(fd)
        raise
    _TRAILER.pack_into(mapping, num_bytes, _MAGIC, nonce, num_bytes)
    return mapping, fd, SharedMemory(os.getpid(), fd, num_bytes, nonce)


def open_mapping(shared: SharedMemory) -> mmap.mmap:
    """Maps a peer's memory for reading. Raises TransferError, with the reason, when it is not what was announced."""
    path = f"/proc/{int(shared.pid)}/fd/{int(shared.fd)}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise _refused(f"{path} is not a block pool")
        # Non-blocking: should the number be reused for a pipe just now, opening it must not wait.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _refused(f"{path} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        expected = shared.num_bytes + _TRAILER.size
        if not stat.S_ISREG(status.st_mode) or status.st_size != expected:
            raise _refused(f"{path} has {status.st_size} bytes, {expected} were announced")
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise _refused(f"{path} is not sealed against shrinking")
        mapping = mmap.mmap(fd, expected, prot=mmap.PROT_READ)
    except OSError as error:
        raise _refused(f"{path} cannot be mapped: {error.strerror}") from error
    finally:
        os.close(fd)
    magic, nonce, num_bytes = _TRAILER.unpack_from(mapping, shared.num_bytes)
    if magic != _MAGIC or num_bytes != shared.num_bytes or not hmac.compare_digest(nonce, shared.nonce):
        raise _refused(f"{path} is another process's block pool")
    return mapping


def _refused(reason: str) -> TransferError:
    return TransferError(TransferCode.INCOMPATIBLE, f"shared memory: {reason}")
