"""The transfer agent: the one object that a worker has for handing blocks over, in both directions.

It lives on the worker's event loop. The pure machines decide; this shell owns the sockets, the calls, the timers and a few
threads for copies and checksums, so that neither a slow peer nor a large block ever holds up the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import grpc.aio

from baton.kvtransfer.canary import LinkReport
from baton.kvtransfer.context import AgentContext
from baton.kvtransfer.crew import Crew
from baton.kvtransfer.errors import TransferError
from baton.kvtransfer.fetch import BlockHolder, Fetch
from baton.kvtransfer.fetching import FetchDesk
from baton.kvtransfer.handshake import PeerClient
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity
from baton.kvtransfer.incoming import ReceiverHost
from baton.kvtransfer.layout import Compatibility
from baton.kvtransfer.mapping import host_id
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.receiving import ReceivingSide
from baton.kvtransfer.sending import HandoffSpec, SenderHandoff, SendingSide
from baton.kvtransfer.service import KVTransferClient, add_to_server, open_local_channel
from baton.kvtransfer.shape import LinkShape, ShapedLink
from baton.kvtransfer.stats import TransferStats
from baton.kvtransfer.transport.base import Transport
from baton.kvtransfer.transport.listener import DataListener
from baton.kvtransfer.transport.registry import make_transports
from baton.kvtransfer.transport.shaper import ShapedTransport
from baton.kvtransfer.transport.sockets import SYSTEM_SOCKETS, Sockets

_WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104 - recognised, not chosen


class TransferAgent:
    """Hands blocks of ``memory`` to other workers, and takes theirs on behalf of ``host``.

    ``holder`` gives blocks to peers that ask for them; without one they are refused.

    ``transports``: ``"auto"`` or names, best first. The data plane listens on ``data_host:data_port`` (0: any free port) and
    tells peers ``advertised_host`` and ``advertised_port``; the host must be given when listening on every address.
    ``open_channel`` makes the gRPC channel to a peer's address, ``sockets`` those of the data plane. ``clock`` is what
    deadlines are on.

    Raises TransferError when a transport that was asked for by name does not work here.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        compatibility: Compatibility,
        memory: BlockMemory,
        host: ReceiverHost,
        *,
        holder: BlockHolder | None = None,
        transports: str | Sequence[str] = "auto",
        data_host: str = "127.0.0.1",
        data_port: int = 0,
        advertised_host: str | None = None,
        advertised_port: int | None = None,
        options: TransferOptions | None = None,
        open_channel: Callable[[str], grpc.aio.Channel] = open_local_channel,
        sockets: Sockets = SYSTEM_SOCKETS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if memory.block_bytes != compatibility.layout.block_bytes:
            raise ValueError(f"blocks of {memory.block_bytes} bytes, {compatibility.layout.block_bytes} in the layout")
        if data_host in _WILDCARDS and not advertised_host:
            raise ValueError("a data plane that listens on every address must be told which one to tell its peers")
        self.identity = identity
        self.host_id = host_id()
        self._data_host, self._data_port = data_host, data_port
        self._advertised_host, self._advertised_port = advertised_host or data_host, advertised_port
        self._open_channel = open_channel
        options = options or TransferOptions()
        self._copying = Crew(options.num_copy_threads, "kv-copy")
        self._hashing = Crew(options.num_send_threads, "kv-send")
        self.compatibility = compatibility
        if options.newest_wire_version is not None:
            versions = compatibility.versions.up_to(options.newest_wire_version)
            self.compatibility = replace(compatibility, versions=versions)
        self._context = AgentContext(
            identity,
            self.compatibility,
            memory,
            _shaped(make_transports(transports, memory, self._copying), options.link_shape, memory.block_bytes),
            self._hashing,
            options,
            TransferStats(),
            clock,
            self._connect,
            sockets,
        )
        self._sending = SendingSide(self._context)
        self._receiving = ReceivingSide(self._context, host)
        self._desk = FetchDesk(self._context, self._sending, holder)
        self._listener: DataListener | None = None

    # Life.

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Registers the control plane with the worker's gRPC server, before that starts."""
        add_to_server(server, self._receiving, self._desk, self.identity, self.probe)

    async def start(self) -> None:
        """Opens the data plane. Raises TransferError when it cannot listen."""
        self._listener = DataListener(
            self._data_host, self._data_port, self._receiving, self._context.options, self._context.sockets
        )
        host = f"[{self._advertised_host}]" if ":" in self._advertised_host else self._advertised_host
        self._receiving.data_address = f"{host}:{self._advertised_port or self._listener.port}"

    @property
    def data_address(self) -> str:
        """host:port of the data plane, as peers reach it. Empty before ``start``."""
        return self._receiving.data_address

    @property
    def transport_names(self) -> tuple[str, ...]:
        """What this worker can use, best first."""
        return tuple(self._context.transports)

    async def close(self) -> None:
        """Gives up every handoff, tells the peers, and returns when no byte moves any more. ``memory`` stays its owner's."""
        await self._desk.close()
        await self._sending.close()
        await self._receiving.close()
        if self._listener is not None:
            self._listener.close()
        self._copying.shutdown()
        self._hashing.shutdown()

    # Sending.

    def open(self, spec: HandoffSpec) -> SenderHandoff:
        """Begins to hand a prompt's blocks over: shakes hands if need be and reserves, in the background."""
        return self._sending.open(spec)

    async def probe(self, receiver: WorkerIdentity, address: str) -> LinkReport:
        """Sends a canary to a worker whose gRPC services are at ``address``: a handoff to it will find the pair made.

        Raises TransferError when no transport to it works, or it is another process or has other blocks.
        """
        return await self._sending.probe(receiver, address)

    # Receiving.

    def expect(self, key: HandoffKey, sender: WorkerIdentity, deadline_s: float | None = None) -> None:
        """Announces a handoff. Without this its reservation is refused; one that came early goes on now."""
        self._receiving.expect(key, sender, deadline_s)

    def forget(self, key: HandoffKey) -> None:
        """The handoff is no longer wanted. Idempotent. One under way is given up and its slots come back by ``released``."""
        self._receiving.forget(key)

    # Fetching.

    async def fetch(
        self,
        key: HandoffKey,
        holder: WorkerIdentity,
        holder_address: str,
        own_address: str,
        block_names: Sequence[bytes],
        deadline_s: float,
    ) -> int:
        """Asks ``holder`` for full blocks of one chain; returns how many leading ones it will hand over, at least one.

        They come as a handoff of that key, which is announced here: the host is asked for room and told of the end like for
        any other, but that the first token is ``NO_TOKEN``. ``forget`` gives it up. The addresses are host:port of gRPC
        services, the holder's and our own. Raises TransferError when nothing will come; then the key is forgotten.
        """
        self.expect(key, holder, deadline_s)
        handoff = HandoffId(key, holder, self.identity)
        time_left_s = deadline_s - self._context.clock()
        try:
            return await self._desk.ask(Fetch(handoff, own_address, tuple(block_names), time_left_s), holder_address)
        except TransferError:
            self.forget(key)
            raise

    # For the worker's metrics, and for tests.

    def stats(self) -> TransferStats:
        """What was counted so far. Owned by the agent: read, do not keep."""
        stats = self._context.stats
        stats.num_receiving = len(self._receiving.active)
        stats.num_quarantined = self._receiving.num_quarantined
        return stats

    def tick(self) -> None:
        """Fires every timer that is due by ``clock``. Timers fire by themselves; this is for a clock that was moved."""
        self._sending.tick()
        self._receiving.tick()

    def _connect(self, address: str) -> PeerClient:
        options = self._context.options
        return KVTransferClient(
            self._open_channel(address),
            address,
            timeout_s=options.rpc_timeout_s,
            reserve_answer_s=options.reserve_answer_s,
        )


def _shaped(transports: dict[str, Transport], shape: LinkShape | None, block_bytes: int) -> dict[str, Transport]:
    """All of them over one link of that shape: a worker has one, whatever its blocks come by."""
    if shape is None:
        return transports
    link = ShapedLink(shape)
    return {name: ShapedTransport(transport, link, block_bytes) for name, transport in transports.items()}
