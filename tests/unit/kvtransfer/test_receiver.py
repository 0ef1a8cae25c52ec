"""The receiving machine, driven by hand with literal times."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import kv_names as kv

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import Fenced, LocalProtocolError, TransferCode
from baton.kvtransfer.identity import manifest_digest
from baton.kvtransfer.protocol import HandoffLimits, ReceiverState
from baton.kvtransfer.receiver import Receiver

RESERVE = m.Reserve(kv.HANDOFF, kv.names(3), 40, "shm")
ABORT = m.Abort(kv.HANDOFF, TransferCode.ABORTED, "enough")
LIMITS = HandoffLimits(lease_s=15, reserve_timeout_s=60, patience_s=2)


def make(**options: Any) -> Receiver:
    return Receiver(kv.HANDOFF, **{"token": kv.TOKEN, "block_bytes": 100, "limits": LIMITS, **options})


def push(*indices: int, token: bytes = kv.TOKEN) -> m.Push:
    return m.Push(kv.HANDOFF, token, kv.slots(*indices))


def landed(*indices: int) -> m.LandingEnded:
    return m.LandingEnded(landed=tuple((index, kv.checksum(index)) for index in indices))


def commit(*indices: int, round: int = 1) -> m.Commit:
    digest = manifest_digest((index, kv.names(3)[index], kv.checksum(index)) for index in indices)
    return m.Commit(kv.HANDOFF, digest, kv.FIRST_TOKEN, 100 * len(indices), round)


def receiving(now: float = 10.0) -> Receiver:
    """Blocks 0 and 2 are granted at ``now``; block 1 is there already."""
    receiver = make()
    receiver.receive(RESERVE, now)
    receiver.receive(m.SlotsReserved(kv.slots(0, 2)), now)
    return receiver


def refusals(commands: list[m.Command]) -> list[TransferCode]:
    return [c.message.code for c in commands if isinstance(c, m.Send) and isinstance(c.message, m.Refuse)]


def releases(commands: list[m.Command]) -> list[bool]:
    return [command.quiet for command in commands if isinstance(command, m.ReleaseSlots)]


def test_the_whole_way() -> None:
    receiver = make()
    assert receiver.receive(RESERVE, 1.0) == [m.ReserveSlots(kv.names(3), 40)]
    grant = m.Grant(kv.HANDOFF, kv.slots(0, 2), 15, kv.TOKEN)
    assert receiver.receive(m.SlotsReserved(kv.slots(0, 2)), 2.0) == [m.Send(grant)]
    assert receiver.receive(push(0), 3.0) == [m.LetLand((0,))]
    assert receiver.receive(landed(0), 3.5) == [m.Send(m.Verdicts(kv.HANDOFF, landed=(0,)))]
    assert receiver.receive(push(2), 3.5) == [m.LetLand((2,))]
    assert receiver.receive(commit(0, 2), 4.0) == []  # held: block 2 is still landing
    report = m.TransferReport("shm", 2, 1, 200, duration_ms=3000.0, commit_ms=1000.0, reserve_wait_ms=1000.0)
    adopt = m.Adopt(kv.FIRST_TOKEN, report)
    assert receiver.receive(landed(2), 5.0) == [m.Send(m.Verdicts(kv.HANDOFF, landed=(2,))), adopt]
    assert receiver.receive(m.Adopted(), 6.0) == [m.Send(m.Ack(kv.HANDOFF)), m.Done(None, report)]
    assert receiver.deadline is None


def test_blocks_that_all_landed_before_the_commit_are_adopted_with_it() -> None:
    receiver = receiving()
    receiver.receive(push(0, 2), 11.0)
    receiver.receive(landed(0, 2), 12.0)
    assert isinstance(receiver.receive(commit(0, 2), 13.0)[0], m.Adopt)


def test_a_repeated_commit_gets_the_same_answer() -> None:
    receiver = receiving()
    receiver.receive(push(0, 2), 11.0)
    receiver.receive(landed(0, 2), 12.0)
    receiver.receive(commit(0, 2), 13.0)
    assert receiver.receive(commit(0, 2), 13.0) == []
    receiver.receive(m.Adopted(), 14.0)
    assert receiver.receive(commit(0, 2), 15.0) == [m.Send(m.Ack(kv.HANDOFF))]


def test_a_repeated_reservation_gets_the_same_grant() -> None:
    receiver = make()
    receiver.receive(RESERVE, 1.0)
    assert receiver.receive(RESERVE, 1.5) == []
    first = receiver.receive(m.SlotsReserved(kv.slots(0, 2)), 2.0)
    assert receiver.receive(RESERVE, 3.0) == first


def test_a_count_that_agrees_is_not_enough() -> None:
    """Two landings of the right number, one of them twice the same block: the bitmap is not full."""
    receiver = receiving()
    receiver.receive(push(0), 11.0)
    receiver.receive(landed(0), 11.0)
    commands = receiver.receive(push(0), 12.0)
    assert commands == [m.Discard((0,)), m.Send(m.Verdicts(kv.HANDOFF, landed=(0,)))]
    assert receiver.receive(commit(0, 2), 13.0) == []
    assert receiver.state is ReceiverState.COMMITTING


@pytest.mark.parametrize("digest_of", [(0,), (2, 0), (0, 1, 2)])
def test_another_manifest_is_refused_and_nothing_becomes_readable(digest_of: tuple[int, ...]) -> None:
    receiver = receiving()
    receiver.receive(push(0, 2), 11.0)
    receiver.receive(landed(0, 2), 12.0)
    commands = receiver.receive(commit(*digest_of), 13.0)
    assert refusals(commands) == [TransferCode.DIGEST_MISMATCH]
    assert releases(commands) == [True]
    assert not any(isinstance(command, m.Adopt) for command in commands)


def test_another_manifest_is_refused_when_the_last_block_lands_after_the_commit() -> None:
    receiver = receiving()
    receiver.receive(push(0, 2), 11.0)
    receiver.receive(landed(0), 12.0)
    receiver.receive(commit(0, 1), 13.0)
    assert refusals(receiver.receive(landed(2), 14.0)) == [TransferCode.DIGEST_MISMATCH]


def test_a_commit_is_held_until_patience_ends_and_then_names_what_is_missing() -> None:
    receiver = receiving(10.0)
    receiver.receive(push(0), 11.0)
    receiver.receive(landed(0), 11.0)
    receiver.receive(commit(0, 2), 12.0)
    assert receiver.deadline == 14.0
    assert receiver.handle_timer(14.0) == [m.Send(m.Incomplete(kv.HANDOFF, 1, (2,)))]
    receiver.receive(push(2), 15.0)
    receiver.receive(landed(2), 15.0)
    assert isinstance(receiver.receive(commit(0, 2, round=2), 16.0)[0], m.Adopt)


def test_patience_lasts_while_a_block_is_landing() -> None:
    receiver = receiving(10.0)
    receiver.receive(push(0, 2), 11.0)
    receiver.receive(commit(0, 2), 12.0)
    assert receiver.handle_timer(14.0) == []
    assert receiver.state is ReceiverState.COMMITTING
    assert receiver.deadline == 16.0


def test_a_corrupt_block_can_be_written_again() -> None:
    receiver = receiving()
    receiver.receive(push(0), 11.0)
    assert receiver.receive(m.LandingEnded(corrupt=(0,)), 12.0) == [m.Send(m.Verdicts(kv.HANDOFF, (), (0,)))]
    assert receiver.receive(push(0), 13.0) == [m.LetLand((0,))]


def test_a_block_cut_short_is_not_judged_and_can_be_written_again() -> None:
    receiver = receiving()
    receiver.receive(push(0), 11.0)
    assert receiver.receive(m.LandingEnded(broken=(0,)), 12.0) == []
    assert receiver.receive(push(0), 13.0) == [m.LetLand((0,))]


def test_a_block_that_is_landing_is_not_written_twice_at_once() -> None:
    receiver = receiving()
    receiver.receive(push(0), 11.0)
    assert receiver.receive(push(0, 2), 12.0) == [m.LetLand((2,)), m.Discard((0,))]


OUTSIDE = [
    pytest.param((m.Slot(1, 101, 7),), id="index not granted"),
    pytest.param((m.Slot(0, 101, 7),), id="other block"),
    pytest.param((m.Slot(0, 100, 8),), id="other generation"),
    pytest.param((m.Slot(0, 100, 7), m.Slot(0, 100, 7)), id="twice"),
    pytest.param((m.Slot(0, 100, 7), m.Slot(9, 109, 7)), id="one good, one bad"),
]


@pytest.mark.parametrize("slots", OUTSIDE)
def test_a_write_outside_the_grant_revokes_it_before_any_byte_lands(slots: tuple[m.Slot, ...]) -> None:
    receiver = receiving()
    commands = receiver.receive(m.Push(kv.HANDOFF, kv.TOKEN, slots), 11.0)
    assert not any(isinstance(command, m.LetLand) for command in commands)
    assert refusals(commands) == [TransferCode.NOT_GRANTED]
    assert releases(commands) == [True]


def test_a_wrong_token_is_fenced_and_changes_nothing() -> None:
    receiver = receiving()
    with pytest.raises(Fenced):
        receiver.receive(push(0, token=bytes(32)), 11.0)
    assert receiver.receive(push(0), 12.0) == [m.LetLand((0,))]


ENDINGS = [
    pytest.param(ABORT, id="abort"),
    pytest.param(m.GiveUp("no longer wanted"), id="give up"),
    pytest.param(m.PeerLost("replaced", TransferCode.STALE), id="peer lost"),
    pytest.param(m.Push(kv.HANDOFF, kv.TOKEN, kv.slots(1)), id="write outside the grant"),
]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("held", [False, True])
def test_slots_are_quarantined_until_the_last_landing_ended(ending: m.Event, held: bool) -> None:
    receiver = receiving()
    receiver.receive(push(0, 2), 11.0)
    if held:
        receiver.receive(commit(0, 2), 11.0)
    commands = receiver.receive(ending, 12.0)
    assert releases(commands) == [False]
    assert m.StopLanding() in commands
    assert receiver.num_quarantined == 2
    assert releases(receiver.receive(m.LandingEnded(broken=(0,)), 13.0)) == []
    commands = receiver.receive(landed(2), 14.0)  # a verified block is of no use any more
    assert releases(commands) == [True]
    assert isinstance(commands[-1], m.Done)
    assert receiver.num_quarantined == 0


@pytest.mark.parametrize("ending", ENDINGS)
def test_without_a_landing_the_slots_are_free_at_once(ending: m.Event) -> None:
    receiver = receiving()
    receiver.receive(push(0), 11.0)
    receiver.receive(landed(0), 11.0)
    assert releases(receiver.receive(ending, 12.0)) == [True]
    assert receiver.state is ReceiverState.CLOSED


def test_expiry_is_terminal_and_everything_later_is_refused() -> None:
    receiver = receiving(10.0)
    assert receiver.deadline == 25.0
    receiver.receive(m.Renew(kv.HANDOFF, 3.0), 20.0)
    commands = receiver.handle_timer(35.0)
    assert refusals(commands) == [TransferCode.EXPIRED]
    assert releases(commands) == [True]
    for late in (commit(0, 2), m.Renew(kv.HANDOFF, 4.0), RESERVE):
        assert refusals(receiver.receive(late, 36.0)) == [TransferCode.EXPIRED]
    assert receiver.receive(push(0), 36.0)[0] == m.Discard((0,))


def test_nothing_is_accepted_after_the_lease_only_because_the_timer_was_late() -> None:
    receiver = receiving(10.0)
    with pytest.raises(LocalProtocolError, match="handle_timer"):
        receiver.receive(push(0), 25.0)


def test_a_reservation_given_up_while_the_host_looks_returns_what_the_host_finds() -> None:
    for ending in (ABORT, m.GiveUp("no longer wanted"), m.PeerLost("gone")):
        receiver = make()
        receiver.receive(RESERVE, 1.0)
        assert m.StopReserving() in receiver.receive(ending, 2.0)
        assert refusals(receiver.receive(RESERVE, 3.0)) != []
        assert releases(receiver.receive(m.SlotsReserved(kv.slots(0)), 4.0)) == [True]
        assert receiver.state is ReceiverState.CLOSED


def test_a_reservation_has_a_deadline() -> None:
    receiver = make()
    receiver.receive(RESERVE, 1.0)
    assert refusals(receiver.handle_timer(61.0)) == [TransferCode.NO_CAPACITY]
    assert receiver.state is ReceiverState.WITHDRAWING
    receiver = make(deadline_s=5.0)
    receiver.receive(RESERVE, 1.0)
    assert refusals(receiver.handle_timer(5.0)) == [TransferCode.EXPIRED]


def test_the_hosts_refusal_is_passed_on() -> None:
    receiver = make()
    receiver.receive(RESERVE, 1.0)
    assert refusals(receiver.receive(m.SlotsRefused(TransferCode.DRAINING, "leaving"), 2.0)) == [TransferCode.DRAINING]


def test_an_abort_that_overtakes_the_reservation_refuses_it() -> None:
    receiver = make()
    assert receiver.receive(ABORT, 1.0)[0] == m.Send(m.AbortAck(kv.HANDOFF))
    assert refusals(receiver.receive(RESERVE, 2.0)) == [TransferCode.ABORTED]


def test_an_abort_is_idempotent() -> None:
    receiver = receiving()
    assert releases(receiver.receive(ABORT, 11.0)) == [True]
    assert receiver.receive(ABORT, 12.0) == [m.Send(m.AbortAck(kv.HANDOFF))]


def test_an_abort_answers_the_commit_that_was_held() -> None:
    receiver = receiving()
    receiver.receive(commit(0, 2), 11.0)
    assert refusals(receiver.receive(ABORT, 12.0)) == [TransferCode.ABORTED]


@pytest.mark.parametrize("adopted", [False, True])
def test_after_adopting_nothing_takes_the_blocks_back(adopted: bool) -> None:
    receiver = receiving()
    receiver.receive(push(0, 2), 11.0)
    receiver.receive(landed(0, 2), 11.0)
    receiver.receive(commit(0, 2), 12.0)
    if adopted:
        receiver.receive(m.Adopted(), 12.0)
    for late in (ABORT, m.GiveUp("late"), m.PeerLost("late"), m.Renew(kv.HANDOFF, 1.0), push(0)):
        assert releases(receiver.receive(late, 1000.0)) == []
    assert receiver.receive(push(0), 1000.0) == [m.Discard((0,))]


def test_a_host_that_cannot_adopt_refuses_the_commit() -> None:
    receiver = receiving()
    receiver.receive(push(0, 2), 11.0)
    receiver.receive(landed(0, 2), 11.0)
    receiver.receive(commit(0, 2), 12.0)
    commands = receiver.receive(m.AdoptFailed(TransferCode.INTERNAL, "no"), 13.0)
    assert refusals(commands) == [TransferCode.INTERNAL]
    assert releases(commands) == [True]
    assert receiver.report is None


def test_slots_that_do_not_fit_the_manifest_are_the_hosts_mistake() -> None:
    receiver = make()
    receiver.receive(RESERVE, 1.0)
    for wrong in (kv.slots(3), kv.slots(0, 0)):
        with pytest.raises(LocalProtocolError):
            receiver.receive(m.SlotsReserved(wrong), 2.0)


def verified(commands: list[m.Command]) -> list[tuple[int, ...]]:
    return [command.verified for command in commands if isinstance(command, m.ReleaseSlots)]


def test_what_had_landed_when_the_handoff_failed_is_named_once() -> None:
    receiver = receiving()
    receiver.receive(push(0), 11.0)
    receiver.receive(landed(0), 12.0)
    receiver.receive(push(2), 12.0)
    assert verified(receiver.receive(m.PeerLost("gone"), 13.0)) == [(0,)]
    assert verified(receiver.receive(m.LandingEnded(broken=(2,)), 14.0)) == [()]


def test_a_corrupt_block_is_not_among_the_verified() -> None:
    receiver = receiving()
    receiver.receive(push(0, 2), 11.0)
    receiver.receive(m.LandingEnded(landed=((2, kv.checksum(2)),), corrupt=(0,)), 12.0)
    assert verified(receiver.receive(m.Abort(kv.HANDOFF, TransferCode.CHECKSUM, "again"), 13.0)) == [(2,)]


def test_nothing_of_a_peer_that_commits_other_blocks_is_verified() -> None:
    receiver = receiving()
    receiver.receive(push(0, 2), 11.0)
    receiver.receive(landed(0, 2), 12.0)
    wrong = m.Commit(kv.HANDOFF, b"?" * 16, kv.FIRST_TOKEN, 200, 1)
    assert verified(receiver.receive(wrong, 13.0)) == [()]


def test_nothing_of_a_peer_that_writes_outside_its_grant_is_verified() -> None:
    receiver = receiving()
    receiver.receive(push(0), 11.0)
    receiver.receive(landed(0), 12.0)
    assert verified(receiver.receive(push(1), 13.0)) == [()]
