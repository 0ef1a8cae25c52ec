"""How two processes agree to exchange blocks, once per pair of them: who they are, what their blocks are, which way they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import Incompatible, TransferError
from baton.kvtransfer.fetch import Fetch
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity
from baton.kvtransfer.layout import Compatibility
from baton.kvtransfer.transport.base import Offer, Source, Transport, attach
from baton.kvtransfer.versions import common_version


@dataclass(frozen=True, slots=True)
class Handshake:
    """Sender: this is us, and these are the ways our blocks can go, best first."""

    sender: WorkerIdentity
    receiver: WorkerIdentity
    compatibility: Compatibility
    transports: tuple[str, ...]
    offer: Offer
    failed: tuple[str, ...] = ()  # transports that were tried between these two and do not work, each with the reason
    keeps_handoffs: bool = False  # those under way go on by the transport that is chosen now


@dataclass(frozen=True, slots=True)
class HandshakeReply:
    """Receiver: this way, to this address, showing this token."""

    transport: str
    data_address: str  # host:port
    data_token: bytes  # 32 random bytes, for this pair of processes
    version: int  # of the wire: the newest that both speak


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """Receiver: these handoffs are over here; all others have their lease renewed."""

    unknown: frozenset[HandoffKey]


class PeerClient(Protocol):
    """The control plane of one peer. Every call raises TransferError: the peer's own, or PEER_LOST when it cannot be asked."""

    async def handshake(self, handshake: Handshake) -> HandshakeReply: ...

    async def reserve(self, message: m.Reserve, timeout_s: float, version: int) -> m.Grant | m.Refuse:
        """Answers when there are slots, or will be none. ``version`` is the pair's: since TIMELY_ANSWERS a peer that says
        nothing is found lost long before ``timeout_s``."""
        ...

    async def commit(self, message: m.Commit, timeout_s: float) -> m.Ack | m.Incomplete | m.Refuse: ...

    async def abort(self, message: m.Abort) -> None: ...

    async def heartbeat(
        self, sender: WorkerIdentity, receiver: WorkerIdentity, live: Sequence[HandoffKey]
    ) -> HeartbeatReply: ...

    async def fetch(self, fetch: Fetch) -> int: ...

    async def close(self) -> None: ...


def choose_version(theirs: Handshake, ours: Compatibility) -> int:
    """The newest version of the wire that both speak. Raises Incompatible, which says who must be upgraded."""
    here, there = ours.versions, theirs.compatibility.versions
    version = common_version(here, there)
    if version is None:
        older = theirs.receiver if here.newest < there.oldest else theirs.sender
        raise Incompatible(
            f"wire version: {theirs.receiver} speaks {here}, {theirs.sender} speaks {there}: upgrade {older.worker_id}"
        )
    return version


async def choose_transport(theirs: Handshake, ours: Mapping[str, Transport]) -> tuple[Transport, Source | None]:
    """The sender's best transport that also works from here, and the sender's rows where it gives access to them.

    Raises Incompatible with the reason why each of them does not.
    """
    reasons: list[str] = []
    for name in theirs.transports:
        transport = ours.get(name)
        if transport is None:
            continue
        try:
            return transport, await attach(transport, theirs.offer)
        except TransferError as error:
            reasons.append(error.message)
    raise Incompatible(
        f"no common transport: {', '.join(theirs.transports) or 'none'} there, {', '.join(ours) or 'none'} here"
        + "".join(f"; {reason}" for reason in reasons)
    )
