"""The sending machine, driven by hand with literal times."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import kv_names as kv

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import LocalProtocolError, RemoteProtocolError, TransferCode
from baton.kvtransfer.identity import manifest_digest
from baton.kvtransfer.protocol import HandoffLimits, SenderState
from baton.kvtransfer.sender import Sender

GRANT = m.Grant(kv.HANDOFF, kv.slots(0, 2), 15.0, kv.TOKEN)  # block 1 is there already
LIMITS = HandoffLimits(reserve_timeout_s=60, ack_timeout_s=30, max_resends=1)


def make(**options: Any) -> Sender:
    options = {"block_bytes": 100, "limits": LIMITS, **options}
    return Sender(kv.HANDOFF, kv.names(3), 40, **options)


def sent(*indices: int) -> m.BlocksSent:
    return m.BlocksSent(tuple((index, kv.checksum(index)) for index in indices))


def pushing(now: float = 10.0) -> Sender:
    """Granted at ``now``, all blocks ready and pushed."""
    sender = make()
    sender.receive(m.Open("tcp"), now)
    sender.receive(m.BlocksReady((0, 1, 2)), now)
    sender.receive(GRANT, now)
    return sender


def committing(now: float = 10.0) -> Sender:
    sender = pushing(now)
    sender.receive(sent(0, 2), now)
    sender.receive(m.Finish(kv.FIRST_TOKEN), now)
    assert sender.state is SenderState.COMMITTING
    return sender


def outcome(commands: list[m.Command]) -> m.Done:
    (done,) = [command for command in commands if isinstance(command, m.Done)]
    return done


def aborts(commands: list[m.Command]) -> list[TransferCode]:
    return [c.message.code for c in commands if isinstance(c, m.Send) and isinstance(c.message, m.Abort)]


def test_blocks_are_pushed_as_they_become_ready_and_what_the_receiver_has_is_not_sent() -> None:
    sender = make()
    assert sender.receive(m.Open("tcp"), 1.0) == [m.Send(m.Reserve(kv.HANDOFF, kv.names(3), 40, "tcp"))]
    assert sender.receive(m.BlocksReady((0,)), 2.0) == []
    assert sender.receive(GRANT, 3.0) == [m.PushBlocks(kv.slots(0), kv.TOKEN)]
    assert sender.receive(m.BlocksReady((1, 2)), 4.0) == [m.PushBlocks(kv.slots(2), kv.TOKEN)]
    assert sender.receive(sent(0), 5.0) == []
    assert sender.receive(m.Finish(kv.FIRST_TOKEN), 6.0) == []
    assert sender.state is SenderState.FLUSHING
    digest = manifest_digest([(0, kv.names(3)[0], kv.checksum(0)), (2, kv.names(3)[2], kv.checksum(2))])
    assert sender.receive(sent(2), 7.0) == [m.Send(m.Commit(kv.HANDOFF, digest, kv.FIRST_TOKEN, 200, 1))]
    assert sender.receive(m.Ack(kv.HANDOFF), 9.0) == [m.StopPushing()]
    report = m.TransferReport("tcp", 2, 1, 200, duration_ms=6000.0, commit_ms=2000.0, reserve_wait_ms=2000.0)
    assert sender.receive(m.Quiet(), 9.5) == [m.Done(None, report)]
    assert sender.state is SenderState.ACKED
    assert sender.deadline is None


def test_a_prompt_computed_before_the_grant_is_committed_as_soon_as_it_is_out() -> None:
    sender = make()
    sender.receive(m.Open("tcp"), 1.0)
    sender.receive(m.BlocksReady((0, 1, 2)), 1.0)
    assert sender.receive(m.Finish(kv.FIRST_TOKEN), 2.0) == []
    assert sender.receive(GRANT, 3.0) == [m.PushBlocks(kv.slots(0, 2), kv.TOKEN)]
    assert isinstance(sender.receive(sent(0, 2), 4.0)[0], m.Send)
    assert sender.state is SenderState.COMMITTING


def test_a_receiver_that_has_everything_is_sent_only_the_commit() -> None:
    sender = make()
    sender.receive(m.Open("tcp"), 1.0)
    sender.receive(m.BlocksReady((0, 1, 2)), 1.0)
    sender.receive(m.Finish(kv.FIRST_TOKEN), 2.0)
    commands = sender.receive(m.Grant(kv.HANDOFF, (), 15.0, kv.TOKEN), 3.0)
    assert commands == [m.Send(m.Commit(kv.HANDOFF, manifest_digest([]), kv.FIRST_TOKEN, 0, 1))]


def test_finishing_before_all_blocks_are_ready_is_a_mistake_and_changes_nothing() -> None:
    sender = make()
    sender.receive(m.Open("tcp"), 1.0)
    sender.receive(m.BlocksReady((0, 1)), 1.0)
    with pytest.raises(LocalProtocolError):
        sender.receive(m.Finish(kv.FIRST_TOKEN), 2.0)
    sender.receive(m.BlocksReady((2,)), 3.0)
    sender.receive(m.Finish(kv.FIRST_TOKEN), 4.0)
    with pytest.raises(LocalProtocolError):
        sender.receive(m.Finish(kv.FIRST_TOKEN), 5.0)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_block_outside_the_manifest_is_a_mistake(index: int) -> None:
    sender = make()
    sender.receive(m.Open("tcp"), 1.0)
    with pytest.raises(LocalProtocolError):
        sender.receive(m.BlocksReady((0, index)), 2.0)


@pytest.mark.parametrize("slots", [kv.slots(3), kv.slots(0, 0)])
def test_an_impossible_grant_is_given_back(slots: tuple[m.Slot, ...]) -> None:
    sender = make()
    sender.receive(m.Open("tcp"), 1.0)
    commands = sender.receive(m.Grant(kv.HANDOFF, slots, 15.0, kv.TOKEN), 2.0)
    assert aborts(commands) == [TransferCode.PROTOCOL]
    assert outcome(sender.receive(m.Quiet(), 2.0)).error is not None


def test_a_refusal_ends_it_at_once() -> None:
    sender = make()
    sender.receive(m.Open("tcp"), 1.0)
    (done,) = sender.receive(m.Refuse(kv.HANDOFF, TransferCode.NO_CAPACITY, "full"), 2.0)
    assert isinstance(done, m.Done)
    assert done.error is not None
    assert (done.error.code, done.error.message, done.error.retryable) == (TransferCode.NO_CAPACITY, "full", True)


def test_a_grant_that_comes_after_the_end_is_given_back() -> None:
    sender = make()
    sender.receive(m.Open("tcp"), 1.0)
    assert aborts(sender.receive(m.GiveUp("enough"), 2.0)) == [TransferCode.ABORTED]
    assert aborts(sender.receive(GRANT, 3.0)) == [TransferCode.ABORTED]
    assert sender.state is SenderState.FAILED


def test_the_blocks_are_released_only_when_the_transport_is_quiet_and_only_once() -> None:
    sender = pushing()
    commands = sender.receive(m.GiveUp("enough"), 11.0)
    assert commands == [m.Send(m.Abort(kv.HANDOFF, TransferCode.ABORTED, "enough")), m.StopPushing()]
    assert sender.receive(m.GiveUp("again"), 11.0) == []
    assert sender.receive(sent(0), 12.0) == []
    assert outcome(sender.receive(m.Quiet(), 13.0)).error is sender.error
    with pytest.raises(LocalProtocolError):
        sender.receive(m.Quiet(), 14.0)


def test_a_corrupt_block_is_sent_once_more_and_then_the_handoff_fails() -> None:
    sender = pushing()
    sender.receive(sent(0, 2), 11.0)
    assert sender.receive(m.Verdicts(kv.HANDOFF, (0,), (2,)), 12.0) == [m.PushBlocks(kv.slots(2), kv.TOKEN)]
    sender.receive(sent(2), 13.0)
    assert aborts(sender.receive(m.Verdicts(kv.HANDOFF, (), (2,)), 14.0)) == [TransferCode.CHECKSUM]


def test_the_commit_waits_for_a_block_that_is_sent_again() -> None:
    sender = pushing()
    sender.receive(sent(0, 2), 11.0)
    sender.receive(m.Verdicts(kv.HANDOFF, (0,), (2,)), 12.0)
    assert sender.receive(m.Finish(kv.FIRST_TOKEN), 13.0) == []
    assert sender.state is SenderState.FLUSHING
    sender.receive(sent(2), 14.0)
    assert sender.state is SenderState.COMMITTING


def test_a_broken_link_costs_only_what_had_not_landed() -> None:
    sender = pushing()
    sender.receive(sent(0, 2), 11.0)
    sender.receive(m.Verdicts(kv.HANDOFF, (0,)), 12.0)
    assert sender.receive(m.LinkLost("reset"), 13.0) == [m.PushBlocks(kv.slots(2), kv.TOKEN)]
    sender.receive(sent(2), 14.0)
    assert aborts(sender.receive(m.LinkLost("reset"), 15.0)) == [TransferCode.PEER_LOST]


def test_blocks_that_were_only_queued_on_a_broken_link_cost_no_resend() -> None:
    sender = pushing()
    for now in (11.0, 12.0, 13.0):
        assert sender.receive(m.LinkLost("reset"), now) == [m.PushBlocks(kv.slots(0, 2), kv.TOKEN)]


def test_missing_blocks_are_sent_again_and_committed_again() -> None:
    sender = committing()
    assert sender.receive(m.Incomplete(kv.HANDOFF, 1, (2,)), 12.0) == [m.PushBlocks(kv.slots(2), kv.TOKEN)]
    (command,) = sender.receive(sent(2), 13.0)
    assert isinstance(command, m.Send)
    assert isinstance(command.message, m.Commit)
    assert command.message.round == 2
    assert sender.receive(m.Incomplete(kv.HANDOFF, 1, (2,)), 14.0) == []  # the answer to the first, come late
    assert aborts(sender.receive(m.Incomplete(kv.HANDOFF, 2, (2,)), 15.0)) == [TransferCode.INCOMPLETE]


def test_an_incomplete_that_names_nothing_is_the_peers_mistake() -> None:
    with pytest.raises(RemoteProtocolError):
        committing().receive(m.Incomplete(kv.HANDOFF, 1, ()), 12.0)


def test_what_the_peer_refused_is_not_aborted_again() -> None:
    sender = committing()
    assert sender.receive(m.Refuse(kv.HANDOFF, TransferCode.DIGEST_MISMATCH, "other blocks"), 12.0) == [m.StopPushing()]
    done = outcome(sender.receive(m.Quiet(), 12.0))
    assert done.error is not None
    assert done.error.code is TransferCode.DIGEST_MISMATCH
    assert done.report is None


def test_no_slots_in_time_ends_the_wait_and_tells_the_peer() -> None:
    sender = make()
    sender.receive(m.Open("tcp"), 1.0)
    assert sender.deadline == 61.0
    assert sender.handle_timer(60.9) == []
    assert aborts(sender.handle_timer(61.0)) == [TransferCode.NO_CAPACITY]
    assert sender.state is SenderState.FAILED


def test_the_lease_runs_out_unless_renewed_and_counts_from_when_the_renewal_was_sent() -> None:
    sender = pushing(10.0)
    assert sender.deadline == 25.0
    sender.receive(m.Renewed(kv.HANDOFF, 20.0), 21.0)
    assert sender.deadline == 35.0
    assert aborts(sender.handle_timer(35.0)) == [TransferCode.EXPIRED]
    assert sender.receive(m.Renewed(kv.HANDOFF, 34.0), 36.0) == []
    assert sender.state is SenderState.SETTLING


def test_an_unanswered_commit_ends() -> None:
    sender = committing(10.0)
    sender.receive(m.Renewed(kv.HANDOFF, 39.0), 20.0)
    assert aborts(sender.handle_timer(40.0)) == [TransferCode.EXPIRED]


def test_the_requests_deadline_ends_it_in_every_waiting_state() -> None:
    for prepare in (lambda s: None, lambda s: s.receive(GRANT, 2.0)):
        sender = make(deadline_s=5.0)
        sender.receive(m.Open("tcp"), 1.0)
        prepare(sender)
        assert sender.deadline == 5.0
        assert aborts(sender.handle_timer(5.0)) == [TransferCode.EXPIRED]


def test_an_event_is_not_taken_while_a_timer_is_due() -> None:
    sender = pushing(10.0)
    with pytest.raises(LocalProtocolError, match="handle_timer"):
        sender.receive(sent(0), 25.0)
    sender.handle_timer(25.0)
    sender.receive(sent(0), 25.0)


def test_a_late_ack_does_not_undo_the_end() -> None:
    sender = committing()
    sender.receive(m.PeerLost("reset"), 12.0)
    sender.receive(m.Ack(kv.HANDOFF), 13.0)
    sender.receive(m.Quiet(), 14.0)
    assert sender.state is SenderState.FAILED


def test_the_receivers_word_may_come_before_the_transports_and_does_not_stand_for_its_checksum() -> None:
    sender = pushing()
    sender.receive(sent(0), 11.0)
    sender.receive(m.Verdicts(kv.HANDOFF, landed=(0, 2)), 11.0)  # the transport has not said yet that 2 is out
    assert sender.receive(m.Finish(kv.FIRST_TOKEN), 12.0) == []
    assert sender.state is SenderState.FLUSHING
    assert sender.receive(sent(2), 13.0) != []
    assert sender.state is SenderState.COMMITTING


def test_a_block_whose_sending_was_never_reported_is_offered_again_on_the_next_link() -> None:
    sender = pushing()
    sender.receive(sent(0), 11.0)
    sender.receive(m.Verdicts(kv.HANDOFF, landed=(0, 2)), 11.0)
    # Its checksum went with the report. The receiver will say at once that it has the block.
    assert sender.receive(m.LinkLost("reset"), 12.0) == [m.PushBlocks(kv.slots(2), kv.TOKEN)]
    sender.receive(sent(2), 13.0)
    sender.receive(m.Finish(kv.FIRST_TOKEN), 14.0)
    assert sender.state is SenderState.COMMITTING
