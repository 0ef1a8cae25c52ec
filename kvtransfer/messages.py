"""The words of the handoff protocol: what one worker says to the other, what happens here, what is to be done.

Everything is a frozen value. ``PeerMessage`` is what crosses between the two machines of a handoff; it is an event for the
one that receives it and travels in a ``Send`` command of the one that says it. ``LocalEvent`` is what the shell around a
machine reports; ``Command`` is what a machine asks its shell to do. Times are seconds of the caller's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.identity import HandoffId


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The token that the prefill produced. ``logprob`` and ``top_logprobs`` (id, logprob) are set if they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Slot(NamedTuple):
    """A place for block ``index`` of the handoff: a block of the receiver's pool at one point of that block's life.

    A tuple, since there are thousands of them: made, compared and taken apart many at a time.
    """

    index: int  # type: ignore[assignment]  # hides the tuple's own method
    block_id: int
    generation: int  # grows with every reuse of the block


@dataclass(frozen=True, slots=True)
class TransferReport:
    """How the blocks came over. Milliseconds."""

    transport: str
    num_blocks: int  # sent
    num_blocks_skipped: int  # the receiver had them
    num_bytes: int
    duration_ms: float  # from the grant to the end
    commit_ms: float  # from the commit to the end: what the transfer adds when computing does not hide it
    reserve_wait_ms: float  # from asking for slots to having them
    checksum: str = "xxh3_64 ok"
    fallbacks: tuple[str, ...] = ()  # transports that failed while the blocks were on the way, each with the reason


# What one machine says to the other.


@dataclass(frozen=True, slots=True)
class PeerMessage:
    """Anything that crosses between the two machines."""

    handoff: HandoffId


@dataclass(frozen=True, slots=True)
class Reserve(PeerMessage):
    """Sender: give me slots. ``block_names`` are those of the whole prompt; the last block may be partly filled."""

    block_names: tuple[bytes, ...]
    num_tokens: int
    transport: str


@dataclass(frozen=True, slots=True)
class Grant(PeerMessage):
    """Receiver: write these, once. What has no slot is here already."""

    slots: tuple[Slot, ...]
    lease_s: float
    token: bytes  # shown with every write


@dataclass(frozen=True, slots=True)
class Refuse(PeerMessage):
    """Receiver: no, for good. Answers any question, or is said unasked: the receiver's way of giving up."""

    code: TransferCode
    reason: str


@dataclass(frozen=True, slots=True)
class Push(PeerMessage):
    """Sender: bytes for these slots are here, or can be taken."""

    token: bytes
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Verdicts(PeerMessage):
    """Receiver: what became of blocks, by index."""

    landed: tuple[int, ...] = ()
    corrupt: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Commit(PeerMessage):
    """Sender: that was all. ``round`` counts the commits of this handoff, from 1."""

    digest: bytes
    first_token: FirstToken
    num_bytes: int
    round: int


@dataclass(frozen=True, slots=True)
class Ack(PeerMessage):
    """Receiver: verified, taken over, readable."""


@dataclass(frozen=True, slots=True)
class Incomplete(PeerMessage):
    """Receiver: commit ``round`` cannot be; these have not arrived."""

    round: int
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abort(PeerMessage):
    """Sender: I give up. Idempotent."""

    code: TransferCode
    reason: str


@dataclass(frozen=True, slots=True)
class AbortAck(PeerMessage):
    """Receiver: heard."""


@dataclass(frozen=True, slots=True)
class Renew(PeerMessage):
    """Sender: still at it."""

    sent_s: float  # sender's clock, echoed


@dataclass(frozen=True, slots=True)
class Renewed(PeerMessage):
    """Receiver: the lease counts from now."""

    sent_s: float


# What the shell of a machine reports.


@dataclass(frozen=True, slots=True)
class LocalEvent:
    """Something that happened on this side."""


@dataclass(frozen=True, slots=True)
class Timeout(LocalEvent):
    """A timer of the machine ran out. Made by the machine itself."""


@dataclass(frozen=True, slots=True)
class ReserveOverdue(Timeout):
    """No slots in time."""


@dataclass(frozen=True, slots=True)
class LeaseExpired(Timeout):
    """Not renewed in time."""


@dataclass(frozen=True, slots=True)
class AckOverdue(Timeout):
    """No answer to the commit in time."""


@dataclass(frozen=True, slots=True)
class PatienceOver(Timeout):
    """A commit is held and nothing arrives any more."""


@dataclass(frozen=True, slots=True)
class HandoffOverdue(Timeout):
    """The handoff as a whole took too long."""


@dataclass(frozen=True, slots=True)
class PeerLost(LocalEvent):
    """The other process is gone, replaced or out of reach."""

    reason: str
    code: TransferCode = TransferCode.PEER_LOST


@dataclass(frozen=True, slots=True)
class GiveUp(LocalEvent):
    """The owner on this side wants no more of it. Idempotent."""

    reason: str
    code: TransferCode = TransferCode.ABORTED


@dataclass(frozen=True, slots=True)
class Open(LocalEvent):
    """Sender: the peer is known and compatible; blocks go by this transport."""

    transport: str


@dataclass(frozen=True, slots=True)
class BlocksReady(LocalEvent):
    """Sender: these blocks, by index, are computed."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksSent(LocalEvent):
    """Sender: the transport has sent these blocks: (index, checksum)."""

    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class LinkLost(LocalEvent):
    """Sender: the data connection broke; what was under way on it is lost. Another one can be made."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finish(LocalEvent):
    """Sender: all blocks are ready, and this is the first token."""

    first_token: FirstToken


@dataclass(frozen=True, slots=True)
class Quiet(LocalEvent):
    """Sender: the transport reads none of our blocks any more."""


@dataclass(frozen=True, slots=True)
class SlotsReserved(LocalEvent):
    """Receiver: the host made room. Indices without a slot are here already."""

    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class SlotsRefused(LocalEvent):
    """Receiver: the host made no room, or stopped trying."""

    code: TransferCode
    reason: str


@dataclass(frozen=True, slots=True)
class LandingEnded(LocalEvent):
    """Receiver: these writes are over, by index. After this no byte of them can arrive."""

    landed: tuple[tuple[int, int], ...] = ()  # whole and verified: (index, checksum)
    corrupt: tuple[int, ...] = ()  # whole, but not what was sent
    broken: tuple[int, ...] = ()  # cut short


@dataclass(frozen=True, slots=True)
class Adopted(LocalEvent):
    """Receiver: the host made the blocks readable."""


@dataclass(frozen=True, slots=True)
class AdoptFailed(LocalEvent):
    """Receiver: the host could not take the blocks over."""

    code: TransferCode
    reason: str


Event = PeerMessage | LocalEvent


# What a machine asks its shell to do.


@dataclass(frozen=True, slots=True)
class Command:
    """Something to be done, in the order given."""


@dataclass(frozen=True, slots=True)
class Send(Command):
    """Tell the other machine."""

    message: PeerMessage


@dataclass(frozen=True, slots=True)
class PushBlocks(Command):
    """Sender: put these blocks on the way."""

    slots: tuple[Slot, ...]
    token: bytes


@dataclass(frozen=True, slots=True)
class StopPushing(Command):
    """Sender: drop what is queued; report Quiet when no block is being read."""


@dataclass(frozen=True, slots=True)
class Done(Command):
    """It is over; on the sender's side the blocks may be released. ``error`` None: the receiver took over. Said once."""

    error: TransferError | None
    report: TransferReport | None


@dataclass(frozen=True, slots=True)
class ReserveSlots(Command):
    """Receiver: ask the host for room; report SlotsReserved or SlotsRefused."""

    block_names: tuple[bytes, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StopReserving(Command):
    """Receiver: stop asking; still report SlotsReserved or SlotsRefused."""


@dataclass(frozen=True, slots=True)
class LetLand(Command):
    """Receiver: these writes may begin; report LandingEnded for each."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Discard(Command):
    """Receiver: these writes may not begin; drop their bytes."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StopLanding(Command):
    """Receiver: end the writes under way; still report LandingEnded for each."""


@dataclass(frozen=True, slots=True)
class Adopt(Command):
    """Receiver: make the blocks readable; report Adopted or AdoptFailed."""

    first_token: FirstToken
    report: TransferReport


@dataclass(frozen=True, slots=True)
class ReleaseSlots(Command):
    """Receiver: the slots are given up. They are reusable once ``quiet``: until then a write can still land in one.

    The blocks at the indices ``verified`` are whole and nothing is written to them any more: they may be kept under their
    names, so that the next attempt need not bring them again. Said the first time only.
    """

    error: TransferError
    quiet: bool
    verified: tuple[int, ...] = ()
