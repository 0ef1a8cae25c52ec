"""How a sender finds a transport that works: shakes hands, connects, sends a canary, and takes the next one if that fails."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import structlog

from baton.kvtransfer.canary import CanaryFailed, CanarySender, LinkReport
from baton.kvtransfer.context import AgentContext
from baton.kvtransfer.errors import RemoteProtocolError, TransferCode, TransferError
from baton.kvtransfer.handshake import Handshake, PeerClient
from baton.kvtransfer.identity import WorkerIdentity, pair_digest
from baton.kvtransfer.mapping import SharedMemory, host_id
from baton.kvtransfer.transport.base import Offer, Transport
from baton.kvtransfer.transport.outlet import Outlet, OutletEvents

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Link:
    """A connection that a canary has come through."""

    transport: Transport
    outlet: Outlet
    token: bytes
    version: int  # of the wire
    report: LinkReport


class Linker:
    """Makes links from this worker. Remembers for a while which transport failed with whom."""

    def __init__(self, context: AgentContext) -> None:
        self._context = context
        self._avoided: dict[tuple[WorkerIdentity, str], float] = {}  # until when

    def avoid(self, receiver: WorkerIdentity, transport: str) -> None:
        """This transport has just failed with this receiver."""
        now = self._context.clock()
        self._avoided = {key: until_s for key, until_s in self._avoided.items() if until_s > now}
        self._avoided[receiver, transport] = now + self._context.options.transport_retry_s

    def candidates(self, receiver: WorkerIdentity) -> list[str]:
        """Transports to try, best first. All of them when all have failed lately: never none."""
        now, ours = self._context.clock(), list(self._context.transports)
        return [name for name in ours if self._avoided.get((receiver, name), 0.0) <= now] or ours

    async def link(
        self,
        receiver: WorkerIdentity,
        client: PeerClient,
        events: OutletEvents,
        canary: CanarySender,
        *,
        failed: Iterable[str] = (),
        keeps_handoffs: bool = False,
    ) -> Link:
        """The best link to be had. ``failed`` transports go into its report, before those that fail here.

        Raises TransferError: what the receiver or the network says, or the reasons why no transport works.
        """
        names, reasons = self.candidates(receiver), list(failed)
        while True:
            try:
                link = await self._try(receiver, client, events, canary, names, reasons, keeps_handoffs)
            except _TransportFailed as failure:
                _log.warning("kv_transport_failed", receiver=str(receiver), transport=failure.name, reason=str(failure))
                self.avoid(receiver, failure.name)
                names = [name for name in names if name != failure.name]
                reasons.append(f"{failure.name}: {failure}")
                if not names:
                    raise TransferError(
                        TransferCode.PEER_LOST, f"no transport to {receiver} works: {'; '.join(reasons)}"
                    ) from failure
            else:
                return replace(link, report=replace(link.report, failed=tuple(reasons)))

    async def _try(
        self,
        receiver: WorkerIdentity,
        client: PeerClient,
        events: OutletEvents,
        canary: CanarySender,
        names: list[str],
        failed: list[str],
        keeps_handoffs: bool,
    ) -> Link:
        context = self._context
        offer = _offer(context.transports[name] for name in names)
        ours = Handshake(
            context.identity, receiver, context.compatibility, tuple(names), offer, tuple(failed), keeps_handoffs
        )
        reply = await client.handshake(ours)
        if reply.transport not in names:
            raise RemoteProtocolError(f"{receiver} chose transport {reply.transport!r}, which was not offered")
        if reply.version not in context.compatibility.versions:
            spoken = context.compatibility.versions
            raise RemoteProtocolError(f"{receiver} chose wire version {reply.version}; {spoken} was offered")
        transport = context.transports[reply.transport]
        outlet = Outlet(
            split_address(reply.data_address),
            pair_fence=pair_digest(context.identity, receiver),
            data_token=reply.data_token,
            transport=transport,
            memory=context.memory,
            executor=context.executor,
            events=events,
            options=context.options,
            sockets=context.sockets,
            version=reply.version,
        )
        try:
            # At once: an address that cannot be reached is found out before anybody waits for blocks.
            await outlet.connect()
            report = LinkReport(transport.name, is_verified=False)
            if context.options.canary_bytes:
                report = await canary.measure(outlet, transport.name, reply.data_token)
        except CanaryFailed as error:
            await outlet.close()
            raise _TransportFailed(transport.name, error.message) from error
        except BaseException:
            await outlet.close()
            raise
        return Link(transport, outlet, reply.data_token, reply.version, report)


class _TransportFailed(Exception):
    """The canary did not come through."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


def _offer(transports: Iterable[Transport]) -> Offer:
    """What the receiver must know for each of the transports."""
    offers = {transport.name: transport.offer() for transport in transports}
    shared = next((offer for offer in offers.values() if isinstance(offer, SharedMemory)), None)
    return Offer(host_id(), shared, {name: offer for name, offer in offers.items() if isinstance(offer, bytes)})


def split_address(address: str) -> tuple[str, int]:
    """``host:port``, the host perhaps in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RemoteProtocolError(f"data address {address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)
