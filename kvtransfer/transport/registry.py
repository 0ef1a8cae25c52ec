"""Transports by name. A transport is imported when it is first asked for, so one with extra requirements costs nobody else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from importlib.util import find_spec
from pathlib import Path

import structlog

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.transport.base import Transport

_log = structlog.get_logger(__name__)

Factory = Callable[[BlockMemory, Executor], Transport]


def _inproc() -> Factory:
    from baton.kvtransfer.transport.inproc import InprocTransport

    return InprocTransport


def _shm() -> Factory:
    from baton.kvtransfer.transport.shm import ShmTransport

    return ShmTransport


def _tcp() -> Factory:
    from baton.kvtransfer.transport.tcp import TcpTransport

    return TcpTransport


def _cuda_ipc() -> Factory:
    from baton.kvtransfer.transport.cuda_ipc import CudaIpcTransport

    return CudaIpcTransport


def _nixl() -> Factory:
    from baton.kvtransfer.transport.nixl import NixlTransport

    return NixlTransport


_FACTORIES: dict[str, Callable[[], Factory]] = {
    "inproc": _inproc,
    "cuda_ipc": _cuda_ipc,
    "shm": _shm,
    "nixl": _nixl,
    "tcp": _tcp,
}
"""Best first: the order in which a sender prefers them."""

TRANSPORT_NAMES = tuple(_FACTORIES)


_RDMA_DEVICES = Path("/sys/class/infiniband")


def _is_usual(name: str, memory: BlockMemory) -> bool:
    """Whether ``auto`` includes it. Without RDMA nixl does what tcp does, so it is left to those who ask for it."""
    if name == "shm":
        return memory.shared is not None
    if name == "cuda_ipc":
        is_cuda = getattr(memory, "device", None) is not None and memory.device.type == "cuda"  # type: ignore[attr-defined]
        return is_cuda and find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    if name == "nixl":
        return find_spec("nixl") is not None and _RDMA_DEVICES.is_dir() and any(_RDMA_DEVICES.iterdir())
    return True


def make_transports(wanted: str | Sequence[str], memory: BlockMemory, executor: Executor) -> dict[str, Transport]:
    """The transports of one worker by name, best first. ``"auto"``: all that work here; ``("auto", "-nixl")``: but this one.

    Raises TransferError for a name that is unknown, or that was asked for by name and does not work here.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    is_auto = names[:1] == ["auto"] and all(name.startswith("-") for name in names[1:])
    if is_auto:
        names = [name for name in TRANSPORT_NAMES if _is_usual(name, memory) and f"-{name}" not in names]
    transports: dict[str, Transport] = {}
    for name in names:
        if name not in _FACTORIES:
            raise TransferError(
                TransferCode.INCOMPATIBLE, f"transport {name!r} is not one of auto, {', '.join(TRANSPORT_NAMES)}"
            )
        try:
            transports[name] = _FACTORIES[name]()(memory, executor)
        except TransferError as error:
            if not is_auto:
                raise
            _log.warning("kv_transport_left_out", transport=name, reason=error.message)
    return transports
