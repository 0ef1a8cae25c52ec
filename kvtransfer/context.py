"""What the parts of one agent share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from baton.kvtransfer.handshake import PeerClient
from baton.kvtransfer.identity import WorkerIdentity
from baton.kvtransfer.layout import Compatibility
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.stats import TransferStats
from baton.kvtransfer.transport.base import Transport
from baton.kvtransfer.transport.sockets import SYSTEM_SOCKETS, Sockets


@dataclass(frozen=True, slots=True)
class AgentContext:
    """Made by the agent, once."""

    identity: WorkerIdentity
    compatibility: Compatibility
    memory: BlockMemory
    transports: Mapping[str, Transport]  # best first
    executor: Executor  # hashes and sends what goes out
    options: TransferOptions
    stats: TransferStats
    clock: Callable[[], float]
    connect: Callable[[str], PeerClient]  # control plane of the worker at an address
    sockets: Sockets = SYSTEM_SOCKETS
