"""Why a handoff failed. One tree; every error has a stable code and says whether another attempt may succeed."""

from __future__ import annotations

from enum import StrEnum


class TransferCode(StrEnum):
    """Stable names of failures. They cross the wire, so a value is never renamed."""

    INCOMPATIBLE = "incompatible"  # blocks of one worker are not blocks of the other
    STALE = "stale"  # meant for, or sent by, another incarnation or attempt
    UNKNOWN_HANDOFF = "unknown_handoff"  # nobody announced it, or it ended long ago
    NO_CAPACITY = "no_capacity"  # the receiver has no room and will not wait
    EVICTED = "evicted"  # the holder has none of the blocks any more that it was asked for
    EXPIRED = "expired"  # a lease or a deadline ran out
    DRAINING = "draining"  # the receiver takes nothing new
    INCOMPLETE = "incomplete"  # blocks are missing although everything was sent
    DIGEST_MISMATCH = "digest_mismatch"  # the receiver holds other blocks than the sender committed
    CHECKSUM = "checksum"  # a block arrived corrupt more often than it is sent again
    NOT_GRANTED = "not_granted"  # a write outside the grant; the grant is revoked
    ABORTED = "aborted"  # one side gave the handoff up on purpose
    PEER_LOST = "peer_lost"  # the other worker, or the way to it, is gone
    PROTOCOL = "protocol"  # a message that the protocol does not allow
    INTERNAL = "internal"  # the worker itself failed


_FINAL = frozenset({TransferCode.INCOMPATIBLE, TransferCode.ABORTED, TransferCode.PROTOCOL, TransferCode.NOT_GRANTED})


class TransferError(Exception):
    """A handoff failed. ``retryable``: another attempt, perhaps with another worker, may succeed."""

    def __init__(self, code: TransferCode, message: str, *, retryable: bool | None = None) -> None:
        super().__init__(f"{code.value}: {message}")
        self.code = code
        self.message = message
        self.retryable = code not in _FINAL if retryable is None else retryable


class Incompatible(TransferError):
    """The two workers can never exchange blocks. The message names both values of whatever differs."""

    def __init__(self, message: str) -> None:
        super().__init__(TransferCode.INCOMPATIBLE, message)


class Fenced(TransferError):
    """A message of another attempt or incarnation, or without the right token. It was refused and changed nothing."""

    def __init__(self, message: str) -> None:
        super().__init__(TransferCode.STALE, message)


class Unanswered(TransferError):
    """The peer was asked and no answer came: not its word but the channel's. Another channel may do better."""

    def __init__(self, message: str) -> None:
        super().__init__(TransferCode.PEER_LOST, message)


class IllegalEvent(TransferError):
    """The protocol has no place for this event in this state. Nothing was changed."""


class LocalProtocolError(IllegalEvent):
    """We broke the rules: a mistake in this program."""

    def __init__(self, message: str) -> None:
        super().__init__(TransferCode.INTERNAL, message, retryable=False)


class RemoteProtocolError(IllegalEvent):
    """The peer broke the rules."""

    def __init__(self, message: str, code: TransferCode = TransferCode.PROTOCOL) -> None:
        super().__init__(code, message)
