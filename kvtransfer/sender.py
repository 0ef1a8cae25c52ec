"""The sending end of one handoff: what the table SENDER asks and does. Pure; see ``protocol.py``."""

from __future__ import annotations

from collections.abc import Sequence

from baton.kvtransfer import bitmap
from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.identity import HandoffId, manifest_digest_of
from baton.kvtransfer.machine import Machine
from baton.kvtransfer.protocol import SENDER, HandoffLimits, SenderState


class Sender(Machine[SenderState]):
    """Hands the blocks of one prompt over.

    ``block_names`` are those of the whole prompt; ``num_tokens`` tokens are in them, ``block_bytes`` bytes in each.
    ``deadline_s`` is when the request is worth nothing any more, on the clock of ``now``.
    """

    TABLE = SENDER

    def __init__(
        self,
        handoff: HandoffId,
        block_names: Sequence[bytes],
        num_tokens: int,
        *,
        block_bytes: int,
        limits: HandoffLimits | None = None,
        deadline_s: float | None = None,
    ) -> None:
        super().__init__(handoff, SenderState.IDLE)
        self.block_names = tuple(block_names)
        self.num_tokens = num_tokens
        self.limits = limits or HandoffLimits()
        self.error: TransferError | None = None
        self.report: m.TransferReport | None = None
        self._block_bytes = block_bytes
        self._deadline_s = deadline_s
        self._transport = ""
        self._slots: dict[int, m.Slot] = {}
        self._token = b""
        self._lease_s = self.limits.lease_s
        # Bitmaps over block indices. granted >= pushed >= sent; landed is the receiver's word.
        self._ready = 0
        self._granted = 0
        self._pushed = 0
        self._sent = 0
        self._landed = 0
        self._checksums: dict[int, int] = {}
        self._resends: dict[int, int] = {}
        self._first_token: m.FirstToken | None = None
        self._round = 0
        self._opened_s = 0.0
        self._granted_s = 0.0
        self._committed_s = 0.0

    @property
    def is_over(self) -> bool:
        """Nothing will happen any more."""
        return self.state in (SenderState.ACKED, SenderState.FAILED)

    @property
    def holds_lease(self) -> bool:
        """The receiver expects to hear that this handoff is alive."""
        return self.state in (SenderState.PUSHING, SenderState.FLUSHING, SenderState.COMMITTING)

    # Questions.

    def _is_in_manifest(self, event: m.BlocksReady) -> bool:
        return not event.indices or (min(event.indices) >= 0 and max(event.indices) < len(self.block_names))

    def _is_all_ready(self, event: m.Event) -> bool:
        return self._ready == bitmap.first(len(self.block_names)) and self._first_token is None

    def _is_all_ready_and_out(self, event: m.Event) -> bool:
        return self._is_all_ready(event) and self._is_out(self._sent)

    def _is_last_out(self, event: m.BlocksSent) -> bool:
        return self._is_out(self._sent | self._newly_sent(event))

    def _is_nonsense(self, event: m.Grant) -> bool:
        indices = {slot[0] for slot in event.slots}
        is_inside = not indices or (min(indices) >= 0 and max(indices) < len(self.block_names))
        return len(indices) != len(event.slots) or not is_inside

    def _is_finished(self, event: m.Event) -> bool:
        return self._first_token is not None

    def _is_finished_and_all_there(self, event: m.Grant) -> bool:
        return self._first_token is not None and not event.slots

    def _is_hopeless(self, event: m.Verdicts | m.LinkLost | m.Incomplete) -> bool:
        """One of these blocks was already sent again as often as it may be."""
        return any(
            self._resends.get(index, 0) >= self.limits.max_resends for index in bitmap.indices(self._to_resend(event))
        )

    def _is_old_round(self, event: m.Incomplete) -> bool:
        return event.round != self._round

    def _is_names_missing(self, event: m.Incomplete) -> bool:
        return bitmap.of(event.missing) & self._granted != 0

    def _is_acked(self, event: m.Quiet) -> bool:
        return self.error is None

    def _is_out(self, sent: int) -> bool:
        # Landed is not enough: the receiver's word can overtake the transport's, which brings the checksum.
        return self._granted & ~sent == 0

    def _newly_sent(self, event: m.BlocksSent) -> int:
        return bitmap.of([index for index, _ in event.blocks]) & self._pushed

    def _to_resend(self, event: m.Verdicts | m.LinkLost | m.Incomplete) -> int:
        """The blocks that this event sends once more, as a bitmap."""
        if isinstance(event, m.Verdicts):
            return bitmap.of(event.corrupt) & self._sent & ~self._landed
        if isinstance(event, m.LinkLost):
            return self._sent & ~self._landed
        return bitmap.of(event.missing) & self._sent  # the others are on their way already

    # Deeds.

    def _do_send_reserve(self, event: m.Open, now: float) -> list[m.Command]:
        self._transport = event.transport
        self._opened_s = now
        self._timers[m.ReserveOverdue] = now + self.limits.reserve_timeout_s
        self._timers[m.HandoffOverdue] = (
            now + self.limits.max_handoff_s if self._deadline_s is None else self._deadline_s
        )
        return [m.Send(m.Reserve(self.handoff, self.block_names, self.num_tokens, event.transport))]

    def _do_note_ready(self, event: m.BlocksReady, now: float) -> None:
        self._ready |= bitmap.of(event.indices)

    def _do_note_finish(self, event: m.Finish, now: float) -> None:
        self._first_token = event.first_token

    def _do_accept(self, event: m.Grant, now: float) -> None:
        self._slots = {slot[0]: slot for slot in event.slots}
        self._granted = bitmap.of(self._slots)
        self._token = event.token
        self._granted_s = now
        self._timers.pop(m.ReserveOverdue, None)
        self._lease_s = event.lease_s
        self._timers[m.LeaseExpired] = now + event.lease_s

    def _do_push(self, event: m.Event, now: float) -> list[m.Command]:
        fresh = self._ready & self._granted & ~self._pushed & ~(self._landed & self._sent)
        self._pushed |= fresh
        slots = tuple(map(self._slots.__getitem__, bitmap.indices(fresh)))
        return [m.PushBlocks(slots, self._token)] if slots else []

    def _do_note_sent(self, event: m.BlocksSent, now: float) -> None:
        self._sent |= self._newly_sent(event)
        self._checksums.update(event.blocks)

    def _do_note_verdicts(self, event: m.Verdicts, now: float) -> None:
        self._landed |= bitmap.of(event.landed) & self._granted
        self._send_again(self._to_resend(event))

    def _do_forget_unlanded(self, event: m.LinkLost, now: float) -> None:
        self._send_again(self._to_resend(event))
        self._pushed &= self._landed & self._sent  # what was queued goes out on the next link, and costs no resend

    def _do_forget_missing(self, event: m.Incomplete, now: float) -> None:
        self._timers.pop(m.AckOverdue, None)
        blocks = self._to_resend(event)
        self._landed &= ~blocks
        self._send_again(blocks)

    def _send_again(self, blocks: int) -> None:
        self._pushed &= ~blocks
        self._sent &= ~blocks
        for index in bitmap.indices(blocks):
            self._resends[index] = self._resends.get(index, 0) + 1

    def _do_renew(self, event: m.Renewed, now: float) -> None:
        # Counted from when the renewal was sent: the receiver's lease cannot end before this one.
        self._timers[m.LeaseExpired] = max(now, event.sent_s + self._lease_s)

    def _do_send_commit(self, event: m.Event, now: float) -> list[m.Command]:
        assert self._first_token is not None
        if self._round == 0:
            self._committed_s = now
        self._round += 1
        self._timers[m.AckOverdue] = now + self.limits.ack_timeout_s
        indices = tuple(bitmap.indices(self._granted))
        names = tuple(map(self.block_names.__getitem__, indices))
        digest = manifest_digest_of(indices, names, tuple(map(self._checksums.__getitem__, indices)))
        num_bytes = self._granted.bit_count() * self._block_bytes
        return [m.Send(m.Commit(self.handoff, digest, self._first_token, num_bytes, self._round))]

    def _do_succeed(self, event: m.Ack, now: float) -> None:
        num_sent = self._granted.bit_count()
        self.report = m.TransferReport(
            transport=self._transport,
            num_blocks=num_sent,
            num_blocks_skipped=len(self.block_names) - num_sent,
            num_bytes=num_sent * self._block_bytes,
            duration_ms=(now - self._granted_s) * 1e3,
            commit_ms=(now - self._committed_s) * 1e3,
            reserve_wait_ms=(self._granted_s - self._opened_s) * 1e3,
        )

    def _do_blame(self, event: m.Event, now: float) -> None:
        self.error = _error(event, self.limits)

    def _do_send_abort(self, event: m.Event, now: float) -> list[m.Command]:
        error = self.error or TransferError(TransferCode.ABORTED, "the sender has given up")
        return [m.Send(m.Abort(self.handoff, error.code, error.message))]

    def _do_stop(self, event: m.Event, now: float) -> list[m.Command]:
        self._timers.clear()
        return [m.StopPushing()]

    def _do_end(self, event: m.Event, now: float) -> list[m.Command]:
        self._timers.clear()
        return [m.Done(self.error, self.report)]


def _error(event: m.Event, limits: HandoffLimits) -> TransferError:
    """Why the handoff failed, in words."""
    match event:
        case m.Refuse() | m.GiveUp() | m.PeerLost():
            return TransferError(event.code, event.reason)
        case m.ReserveOverdue():
            return TransferError(TransferCode.NO_CAPACITY, f"no slots within {limits.reserve_timeout_s:g} s")
        case m.LeaseExpired():
            return TransferError(TransferCode.EXPIRED, f"the lease was not renewed for {limits.lease_s:g} s")
        case m.AckOverdue():
            return TransferError(TransferCode.EXPIRED, f"the commit was not answered within {limits.ack_timeout_s:g} s")
        case m.HandoffOverdue():
            return TransferError(TransferCode.EXPIRED, "the deadline of the handoff has passed")
        case m.Verdicts():
            return TransferError(TransferCode.CHECKSUM, f"blocks {list(event.corrupt)} arrived corrupt again")
        case m.LinkLost():
            return TransferError(TransferCode.PEER_LOST, f"the data connection broke again: {event.reason}")
        case m.Incomplete():
            return TransferError(TransferCode.INCOMPLETE, f"blocks {list(event.missing)} are missing again")
        case _:
            return TransferError(TransferCode.PROTOCOL, f"{type(event).__name__} makes no sense")
