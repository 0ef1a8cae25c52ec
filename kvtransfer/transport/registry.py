"""Transports by name. A transport is imported when it is first asked for, so one with extra requirements costs nobody else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.transport.base import Transport

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


_FACTORIES: dict[str, Callable[[], Factory]] = {"inproc": _inproc, "shm": _shm, "tcp": _tcp}
"""Best first: the order in which a sender prefers them."""

TRANSPORT_NAMES = tuple(_FACTORIES)


def make_transports(wanted: str | Sequence[str], memory: BlockMemory, executor: Executor) -> dict[str, Transport]:
    """The transports of one worker by name, best first. ``"auto"``: all that work here.

    Raises TransferError for a name that is unknown, or that was asked for by name and does not work here.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if names == ["auto"]:
        names = [name for name in TRANSPORT_NAMES if name != "shm" or memory.shared is not None]
    transports: dict[str, Transport] = {}
    for name in names:
        if name not in _FACTORIES:
            raise TransferError(
                TransferCode.INCOMPATIBLE, f"transport {name!r} is not one of auto, {', '.join(TRANSPORT_NAMES)}"
            )
        transports[name] = _FACTORIES[name]()(memory, executor)
    return transports
