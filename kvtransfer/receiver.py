"""The receiving end of one handoff: what the table RECEIVER asks and does. Pure; see ``protocol.py``."""

from __future__ import annotations

import hmac

from baton.kvtransfer import bitmap
from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import Fenced, TransferCode, TransferError
from baton.kvtransfer.identity import HandoffId, manifest_digest_of
from baton.kvtransfer.machine import Machine
from baton.kvtransfer.protocol import RECEIVER, HandoffLimits, ReceiverState

# Why a handoff failed when what its sender announced is not believed.
_DISTRUST = frozenset({TransferCode.NOT_GRANTED, TransferCode.DIGEST_MISMATCH, TransferCode.PROTOCOL})


class Receiver(Machine[ReceiverState]):
    """Takes the blocks of one prompt over.

    ``token`` (32 random bytes, from outside) must be shown with every write. ``block_bytes`` are the bytes of a block;
    ``deadline_s`` is when the request is worth nothing any more, on the clock of ``now``.
    """

    TABLE = RECEIVER

    def __init__(
        self,
        handoff: HandoffId,
        *,
        token: bytes,
        block_bytes: int,
        limits: HandoffLimits | None = None,
        deadline_s: float | None = None,
    ) -> None:
        super().__init__(handoff, ReceiverState.IDLE)
        self.limits = limits or HandoffLimits()
        self.error: TransferError | None = None
        self.report: m.TransferReport | None = None
        self.slots: dict[int, m.Slot] = {}
        self._token = token
        self._block_bytes = block_bytes
        self._deadline_s = deadline_s
        self._block_names: tuple[bytes, ...] = ()
        self._transport = ""
        # Bitmaps over block indices. granted >= landing + landed, and no block is in both.
        self._granted = 0
        self._landing = 0
        self._landed = 0
        self._checksums: dict[int, int] = {}
        self._commit: m.Commit | None = None
        self._asked_s = 0.0
        self._granted_s = 0.0
        self._committed_s: float | None = None

    @property
    def is_over(self) -> bool:
        """Nothing will happen any more; late messages still get their answer."""
        return self.state in (ReceiverState.ACKED, ReceiverState.CLOSED)

    @property
    def num_quarantined(self) -> int:
        """Slots that are given up but not yet reusable."""
        return len(self.slots) if self.state is ReceiverState.QUARANTINE else 0

    def _check_fence(self, message: m.PeerMessage) -> None:
        if isinstance(message, m.Push) and not hmac.compare_digest(message.token, self._token):
            raise Fenced(f"a write with a wrong transfer token for {self.handoff}")

    # Questions.

    def _is_slots_fit(self, event: m.SlotsReserved) -> bool:
        indices = {slot[0] for slot in event.slots}
        is_inside = not indices or (min(indices) >= 0 and max(indices) < len(self._block_names))
        return len(indices) == len(event.slots) and is_inside

    def _is_outside_grant(self, event: m.Push) -> bool:
        indices = _indices(event)
        granted = tuple(map(self.slots.get, indices))
        return len(set(indices)) != len(indices) or granted != event.slots

    def _is_outside_grant_while_landing(self, event: m.Push) -> bool:
        return self._landing != 0 and self._is_outside_grant(event)

    def _is_landing(self, event: m.Event) -> bool:
        return self._landing != 0

    def _is_known_landings(self, event: m.LandingEnded) -> bool:
        return _ended(event) & ~self._landing == 0

    def _is_last_landing(self, event: m.LandingEnded) -> bool:
        return _ended(event) == self._landing

    def _is_whole(self, event: m.Commit | m.LandingEnded) -> bool:
        """With this event the commit is there and so is every block."""
        if isinstance(event, m.Commit):
            return self._landed == self._granted
        return self._is_known_landings(event) and self._landed | _landed(event) == self._granted

    def _is_wrong_manifest(self, event: m.Commit | m.LandingEnded) -> bool:
        if not self._is_whole(event):
            return False
        commit = event if isinstance(event, m.Commit) else self._commit
        assert commit is not None
        checksums = self._checksums if isinstance(event, m.Commit) else {**self._checksums, **dict(event.landed)}
        indices = tuple(bitmap.indices(self._granted))
        names = tuple(map(self._block_names.__getitem__, indices))
        return manifest_digest_of(indices, names, tuple(map(checksums.__getitem__, indices))) != commit.digest

    # Deeds.

    def _do_ask_host(self, event: m.Reserve, now: float) -> list[m.Command]:
        self._block_names = event.block_names
        self._transport = event.transport
        self._asked_s = now
        self._timers[m.ReserveOverdue] = now + self.limits.reserve_timeout_s
        self._timers[m.HandoffOverdue] = (
            now + self.limits.max_handoff_s if self._deadline_s is None else self._deadline_s
        )
        return [m.ReserveSlots(event.block_names, event.num_tokens)]

    def _do_stop_asking(self, event: m.Event, now: float) -> list[m.Command]:
        self._timers.clear()
        return [m.StopReserving()]

    def _do_take_slots(self, event: m.SlotsReserved, now: float) -> None:
        self.slots = {slot[0]: slot for slot in event.slots}
        self._granted = bitmap.of(self.slots)
        self._granted_s = now
        self._timers.pop(m.ReserveOverdue, None)
        self._timers[m.LeaseExpired] = now + self.limits.lease_s

    def _do_send_grant(self, event: m.Event, now: float) -> list[m.Command]:
        return [m.Send(m.Grant(self.handoff, tuple(self.slots.values()), self.limits.lease_s, self._token))]

    def _do_renew(self, event: m.Renew, now: float) -> None:
        self._timers[m.LeaseExpired] = now + self.limits.lease_s

    def _do_send_renewed(self, event: m.Renew, now: float) -> list[m.Command]:
        return [m.Send(m.Renewed(self.handoff, event.sent_s))]

    def _do_let_land(self, event: m.Push, now: float) -> list[m.Command]:
        pushed = bitmap.of(_indices(event))
        fresh = pushed & ~self._landing & ~self._landed
        self._landing |= fresh
        commands: list[m.Command] = []
        if fresh:
            commands.append(m.LetLand(tuple(bitmap.indices(fresh))))
        if pushed & ~fresh:
            # A block that is here already, or arriving, is never written again; the sender learns what it missed.
            commands.append(m.Discard(tuple(bitmap.indices(pushed & ~fresh))))
        if known := tuple(bitmap.indices(pushed & self._landed)):
            commands.append(m.Send(m.Verdicts(self.handoff, landed=known)))
        return commands

    def _do_discard(self, event: m.Push, now: float) -> list[m.Command]:
        return [m.Discard(_indices(event))]

    def _do_note_landed(self, event: m.LandingEnded, now: float) -> None:
        self._landing &= ~_ended(event)
        self._landed |= _landed(event)
        self._checksums.update(event.landed)

    def _do_note_ended(self, event: m.LandingEnded, now: float) -> None:
        self._landing &= ~_ended(event)

    def _do_send_verdicts(self, event: m.LandingEnded, now: float) -> list[m.Command]:
        if not event.landed and not event.corrupt:
            return []  # cut short with its link, which the sender sees as well
        landed = tuple([index for index, _ in event.landed])
        return [m.Send(m.Verdicts(self.handoff, landed, event.corrupt))]

    def _do_stop_landing(self, event: m.Event, now: float) -> list[m.Command]:
        return [m.StopLanding()]

    def _do_hold(self, event: m.Commit, now: float) -> None:
        self._commit = event
        if self._committed_s is None:
            self._committed_s = now

    def _do_be_patient(self, event: m.Event, now: float) -> None:
        if self._commit is not None:
            self._timers[m.PatienceOver] = now + self.limits.patience_s

    def _do_forget_commit(self, event: m.Event, now: float) -> None:
        self._commit = None

    def _do_send_incomplete(self, event: m.PatienceOver, now: float) -> list[m.Command]:
        assert self._commit is not None
        missing = tuple(bitmap.indices(self._granted & ~self._landed))
        return [m.Send(m.Incomplete(self.handoff, self._commit.round, missing))]

    def _do_adopt(self, event: m.Commit | m.LandingEnded, now: float) -> list[m.Command]:
        assert self._commit is not None
        assert self._committed_s is not None
        self._timers.clear()
        num_landed = self._granted.bit_count()
        self.report = m.TransferReport(
            transport=self._transport,
            num_blocks=num_landed,
            num_blocks_skipped=len(self._block_names) - num_landed,
            num_bytes=num_landed * self._block_bytes,
            duration_ms=(now - self._granted_s) * 1e3,
            commit_ms=(now - self._committed_s) * 1e3,
            reserve_wait_ms=(self._granted_s - self._asked_s) * 1e3,
        )
        return [m.Adopt(self._commit.first_token, self.report)]

    def _do_send_ack(self, event: m.Event, now: float) -> list[m.Command]:
        return [m.Send(m.Ack(self.handoff))]

    def _do_blame(self, event: m.Event, now: float) -> None:
        self.error = _error(event, self.limits)
        self.report = None

    def _do_send_refuse(self, event: m.Event, now: float) -> list[m.Command]:
        error = self.error or TransferError(TransferCode.ABORTED, "the receiver has given up")
        return [m.Send(m.Refuse(self.handoff, error.code, error.message))]

    def _do_answer_commit(self, event: m.Abort, now: float) -> list[m.Command]:
        return self._do_send_refuse(event, now) if self._commit is not None else []

    def _do_send_abort_ack(self, event: m.Abort, now: float) -> list[m.Command]:
        return [m.Send(m.AbortAck(self.handoff))]

    def _do_quarantine(self, event: m.Event, now: float) -> list[m.Command]:
        return self._release(quiet=False)

    def _do_release(self, event: m.Event, now: float) -> list[m.Command]:
        return self._release(quiet=True)

    def _release(self, *, quiet: bool) -> list[m.Command]:
        self._timers.clear()
        error = self.error or TransferError(TransferCode.ABORTED, "given up")
        # Each of these has its announced checksum. A peer that announces what it may not is not believed that either.
        verified = () if error.code in _DISTRUST else tuple(bitmap.indices(self._landed))
        self._landed = 0
        return [m.ReleaseSlots(error, quiet, verified)]

    def _do_end(self, event: m.Event, now: float) -> list[m.Command]:
        self._timers.clear()
        return [m.Done(self.error, self.report)]


def _indices(event: m.Push) -> tuple[int, ...]:
    return tuple([slot[0] for slot in event.slots])


def _landed(event: m.LandingEnded) -> int:
    """What arrived whole with this event, as a bitmap."""
    return bitmap.of([index for index, _ in event.landed])


def _ended(event: m.LandingEnded) -> int:
    """The landings that this event closes, as a bitmap."""
    return _landed(event) | bitmap.of(event.corrupt) | bitmap.of(event.broken)


def _error(event: m.Event, limits: HandoffLimits) -> TransferError:
    """Why the handoff failed, in words."""
    match event:
        case m.Abort() | m.GiveUp() | m.PeerLost() | m.SlotsRefused() | m.AdoptFailed():
            return TransferError(event.code, event.reason)
        case m.ReserveOverdue():
            return TransferError(TransferCode.NO_CAPACITY, f"no room within {limits.reserve_timeout_s:g} s")
        case m.LeaseExpired():
            return TransferError(TransferCode.EXPIRED, f"the sender did not renew its lease for {limits.lease_s:g} s")
        case m.HandoffOverdue():
            return TransferError(TransferCode.EXPIRED, "the deadline of the handoff has passed")
        case m.Push():
            return TransferError(
                TransferCode.NOT_GRANTED, "a write to a slot that was not granted; the grant is revoked"
            )
        case _:
            return TransferError(TransferCode.DIGEST_MISMATCH, "the manifest is not of the blocks that arrived")
