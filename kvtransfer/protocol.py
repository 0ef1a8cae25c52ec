"""The handoff protocol: both ends of one handoff, as two tables.

Rules of this file
  1. Every transition of a handoff is in the tables SENDER and RECEIVER, nowhere else; the README's diagram is made from them.
  2. The tables name what is asked and what is done; ``sender.py`` and ``receiver.py`` say how. None of the three has a clock,
     randomness or I/O: the time, the transfer token and all that happened come in, commands go out.
  3. An event without a cell in its state's row raises and changes nothing. So does a message of another attempt or incarnation.
  4. What was refused once stays refused: no transition leads out of ACKED, FAILED and CLOSED.

Theory of operation
  A block must not be reused while somebody may still read it, and a slot must not be reused while somebody may still write
  it. Each machine keeps its side of that. The sender says Done (release the blocks) only after its transport is Quiet; the
  receiver says ReleaseSlots(quiet=True) only when no landing is open. So an ending is two steps where bytes may be
  moving: decided (SETTLING, QUARANTINE), then over (ACKED, FAILED, CLOSED).

  What arrived is a bitmap. A block is in it once the receiver verified its own copy. A commit is held until the bitmap equals
  the grant; then the digest over names and checksums must agree; only then the host adopts the blocks, and only then the
  sender hears Ack. Adopting is the point of no return: a later abort, expiry or lost peer changes nothing on the receiver, and
  a repeated commit gets the same Ack. Before that point every ending is told to the other side; leases are the backstop
  for those who can no longer speak. The sender can fail although the receiver adopted, when the Ack is lost: the gateway,
  who opened the handoff, closes it on both sides.

  A handoff that fails after blocks were verified has not failed them: ReleaseSlots names them, the host keeps them as cache
  under their names, and the next attempt, from whichever sender, finds them and is not granted slots for them.

  A block that arrived corrupt, was on a link that broke, or is missing at a commit is sent again, ``max_resends`` times.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from baton.kvtransfer import messages as m
from baton.kvtransfer.machine import Row, Table, go, row


@dataclass(frozen=True, slots=True)
class HandoffLimits:
    """How long each side waits, and how often a block is sent again."""

    lease_s: float = 15.0  # three heartbeats: one may be lost and one late
    reserve_timeout_s: float = 60.0  # waiting for room; a request's own deadline is usually shorter
    ack_timeout_s: float = 30.0  # from a commit to its answer
    patience_s: float = 2.0  # a commit is held this long without anything arriving
    max_handoff_s: float = 600.0  # the whole of it, where the request has no deadline
    max_resends: int = 1


class SenderState(StrEnum):
    """Where the sending side is."""

    IDLE = "idle"  # before the handshake
    RESERVING = "reserving"  # asked for slots
    PUSHING = "pushing"  # blocks go out as they are computed
    FLUSHING = "flushing"  # all are computed; some are still going out
    COMMITTING = "committing"  # all are out; the receiver verifies
    SETTLING = "settling"  # the outcome is decided; the transport still reads our blocks
    ACKED = "acked"
    FAILED = "failed"


class ReceiverState(StrEnum):
    """Where the receiving side is."""

    IDLE = "idle"
    RESERVING = "reserving"  # the host looks for room
    WITHDRAWING = "withdrawing"  # given up while the host looked; it may have found some
    RECEIVING = "receiving"  # granted; blocks land
    COMMITTING = "committing"  # a commit is held until the last block has landed
    ADOPTING = "adopting"  # verified; the host makes the blocks readable
    QUARANTINE = "quarantine"  # given up, but a write can still land
    ACKED = "acked"
    CLOSED = "closed"


S = SenderState
R = ReceiverState

_ANSWERS = (m.Grant, m.Verdicts, m.Renewed, m.Refuse, m.Incomplete, m.Ack, m.AbortAck)
"""Everything that a receiver can say."""

_OVER = (m.GiveUp, m.PeerLost, m.LeaseExpired, m.HandoffOverdue)
"""What ends a handoff on one side, once the grant is there, without the other side having said so."""


def _moving(here: SenderState) -> Row[SenderState]:
    """What can happen to blocks on their way, in each of the three states in which some are."""
    fail = ("blame", "send_abort", "stop")
    return {
        **row(_OVER, go(S.SETTLING, *fail)),
        m.Refuse: (go(S.SETTLING, "blame", "stop"),),
        m.Verdicts: (go(S.SETTLING, *fail, when="hopeless"), go(here, "note_verdicts", "push")),
        m.LinkLost: (go(S.SETTLING, *fail, when="hopeless"), go(here, "forget_unlanded", "push")),
        m.Renewed: (go(here, "renew"),),
        m.Grant: (go(here),),  # a repeated answer
    }


SENDER: Table[SenderState] = {
    S.IDLE: {
        m.BlocksReady: (go(S.IDLE, "note_ready", when="in_manifest"),),
        m.Finish: (go(S.IDLE, "note_finish", when="all_ready"),),
        m.Open: (go(S.RESERVING, "send_reserve"),),
        **row((m.GiveUp, m.PeerLost), go(S.FAILED, "blame", "end")),
    },
    S.RESERVING: {
        m.BlocksReady: (go(S.RESERVING, "note_ready", when="in_manifest"),),
        m.Finish: (go(S.RESERVING, "note_finish", when="all_ready"),),
        m.Grant: (
            go(S.SETTLING, "blame", "send_abort", "stop", when="nonsense"),
            go(S.COMMITTING, "accept", "send_commit", when="finished_and_all_there"),
            go(S.FLUSHING, "accept", "push", when="finished"),
            go(S.PUSHING, "accept", "push"),
        ),
        m.Refuse: (go(S.FAILED, "blame", "end"),),
        **row((m.GiveUp, m.PeerLost, m.ReserveOverdue, m.HandoffOverdue), go(S.FAILED, "blame", "send_abort", "end")),
    },
    S.PUSHING: {
        **_moving(S.PUSHING),
        m.BlocksReady: (go(S.PUSHING, "note_ready", "push", when="in_manifest"),),
        m.BlocksSent: (go(S.PUSHING, "note_sent"),),
        m.Finish: (
            go(S.COMMITTING, "note_finish", "send_commit", when="all_ready_and_out"),
            go(S.FLUSHING, "note_finish", when="all_ready"),
        ),
    },
    S.FLUSHING: {
        **_moving(S.FLUSHING),
        m.BlocksSent: (go(S.COMMITTING, "note_sent", "send_commit", when="last_out"), go(S.FLUSHING, "note_sent")),
        m.Incomplete: (go(S.FLUSHING),),  # the answer to a repeated commit
        m.Ack: (go(S.SETTLING, "succeed", "stop"),),  # likewise: it was whole after all
    },
    S.COMMITTING: {
        **_moving(S.COMMITTING),
        m.BlocksSent: (go(S.COMMITTING, "note_sent"),),
        m.Incomplete: (
            go(S.COMMITTING, when="old_round"),
            go(S.SETTLING, "blame", "send_abort", "stop", when="hopeless"),
            go(S.FLUSHING, "forget_missing", "push", when="names_missing"),
        ),
        m.Ack: (go(S.SETTLING, "succeed", "stop"),),
        m.AckOverdue: (go(S.SETTLING, "blame", "send_abort", "stop"),),
    },
    S.SETTLING: {
        m.Quiet: (go(S.ACKED, "end", when="acked"), go(S.FAILED, "end")),
        **row((m.GiveUp, m.PeerLost, m.LinkLost, m.BlocksReady, m.BlocksSent, m.Finish), go(S.SETTLING)),
        **row(_ANSWERS, go(S.SETTLING)),
    },
    S.ACKED: {
        **row((m.GiveUp, m.PeerLost, m.LinkLost), go(S.ACKED)),
        **row(_ANSWERS, go(S.ACKED)),
    },
    S.FAILED: {
        **row((m.GiveUp, m.PeerLost, m.LinkLost, m.BlocksReady, m.Finish), go(S.FAILED)),
        **row(_ANSWERS, go(S.FAILED)),
        m.Grant: (go(S.FAILED, "send_abort"),),  # a permission that nobody will use
    },
}


def _landing(here: ReceiverState) -> Row[ReceiverState]:
    """What can happen while blocks land, with or without a commit held."""
    revoke = ("blame", "discard", "send_refuse")
    return {
        m.Push: (
            go(R.QUARANTINE, *revoke, "stop_landing", "quarantine", when="outside_grant_while_landing"),
            go(R.CLOSED, *revoke, "release", "end", when="outside_grant"),
            go(here, "let_land", "be_patient"),
        ),
        **row(
            _OVER,
            go(R.QUARANTINE, "blame", "send_refuse", "stop_landing", "quarantine", when="landing"),
            go(R.CLOSED, "blame", "send_refuse", "release", "end"),
        ),
        m.Abort: (
            go(R.QUARANTINE, "blame", "send_abort_ack", "answer_commit", "stop_landing", "quarantine", when="landing"),
            go(R.CLOSED, "blame", "send_abort_ack", "answer_commit", "release", "end"),
        ),
        m.Renew: (go(here, "renew", "send_renewed"),),
        m.Reserve: (go(here, "send_grant"),),  # a repeated question
    }


def _refusing(here: ReceiverState) -> Row[ReceiverState]:
    """How everything is answered once the handoff failed."""
    return {
        m.Push: (go(here, "discard", "send_refuse"),),
        **row((m.Reserve, m.Commit, m.Renew), go(here, "send_refuse")),
        m.Abort: (go(here, "send_abort_ack"),),
        **row((m.GiveUp, m.PeerLost), go(here)),
    }


def _adopted(here: ReceiverState) -> Row[ReceiverState]:
    """What no longer matters once the host owns the blocks."""
    return {
        m.Push: (go(here, "discard"),),
        m.Reserve: (go(here, "send_grant"),),
        m.Renew: (go(here, "send_renewed"),),
        m.Abort: (go(here, "send_abort_ack"),),
        **row((m.GiveUp, m.PeerLost), go(here)),
    }


RECEIVER: Table[ReceiverState] = {
    R.IDLE: {
        m.Reserve: (go(R.RESERVING, "ask_host"),),
        m.Abort: (go(R.CLOSED, "blame", "send_abort_ack", "end"),),  # it overtook the Reserve
        m.GiveUp: (go(R.CLOSED, "blame", "end"),),
    },
    R.RESERVING: {
        m.SlotsReserved: (go(R.RECEIVING, "take_slots", "send_grant", when="slots_fit"),),
        m.SlotsRefused: (go(R.CLOSED, "blame", "send_refuse", "end"),),
        **row((m.Reserve, m.Renew), go(R.RESERVING)),
        m.Abort: (go(R.WITHDRAWING, "blame", "send_abort_ack", "send_refuse", "stop_asking"),),
        **row(
            (m.GiveUp, m.PeerLost, m.ReserveOverdue, m.HandoffOverdue),
            go(R.WITHDRAWING, "blame", "send_refuse", "stop_asking"),
        ),
    },
    R.WITHDRAWING: {
        **_refusing(R.WITHDRAWING),
        m.SlotsReserved: (go(R.CLOSED, "release", "end"),),
        m.SlotsRefused: (go(R.CLOSED, "end"),),
    },
    R.RECEIVING: {
        **_landing(R.RECEIVING),
        m.LandingEnded: (go(R.RECEIVING, "note_landed", "send_verdicts", when="known_landings"),),
        m.Commit: (
            go(R.CLOSED, "blame", "send_refuse", "release", "end", when="wrong_manifest"),
            go(R.ADOPTING, "hold", "adopt", when="whole"),
            go(R.COMMITTING, "hold", "be_patient"),
        ),
    },
    R.COMMITTING: {
        **_landing(R.COMMITTING),
        m.LandingEnded: (
            go(R.CLOSED, "note_landed", "blame", "send_refuse", "release", "end", when="wrong_manifest"),
            go(R.ADOPTING, "note_landed", "send_verdicts", "adopt", when="whole"),
            go(R.COMMITTING, "note_landed", "send_verdicts", "be_patient", when="known_landings"),
        ),
        m.Commit: (go(R.COMMITTING, "hold"),),
        m.PatienceOver: (
            go(R.COMMITTING, "be_patient", when="landing"),
            go(R.RECEIVING, "send_incomplete", "forget_commit"),
        ),
    },
    R.ADOPTING: {
        **_adopted(R.ADOPTING),
        m.Commit: (go(R.ADOPTING),),
        m.Adopted: (go(R.ACKED, "send_ack", "end"),),
        m.AdoptFailed: (go(R.CLOSED, "blame", "send_refuse", "release", "end"),),
    },
    R.ACKED: {
        **_adopted(R.ACKED),
        m.Commit: (go(R.ACKED, "send_ack"),),
    },
    R.QUARANTINE: {
        **_refusing(R.QUARANTINE),
        m.LandingEnded: (
            go(R.CLOSED, "note_ended", "release", "end", when="last_landing"),
            go(R.QUARANTINE, "note_ended", when="known_landings"),
        ),
    },
    R.CLOSED: _refusing(R.CLOSED),
}
