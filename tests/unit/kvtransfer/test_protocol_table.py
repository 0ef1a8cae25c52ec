"""The tables as tables: every cell can be acted on, everything else raises and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import kv_names as kv

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import Fenced, LocalProtocolError, RemoteProtocolError, TransferCode
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity
from baton.kvtransfer.machine import Machine, Table
from baton.kvtransfer.protocol import RECEIVER, SENDER, ReceiverState, SenderState
from baton.kvtransfer.receiver import Receiver
from baton.kvtransfer.sender import Sender

EVENTS: dict[type[m.Event], m.Event] = {
    type(event): event
    for event in (
        m.Reserve(kv.HANDOFF, kv.names(3), 40, "tcp"),
        m.Grant(kv.HANDOFF, kv.slots(0, 1, 2), 15.0, kv.TOKEN),
        m.Refuse(kv.HANDOFF, TransferCode.NO_CAPACITY, "full"),
        m.Push(kv.HANDOFF, kv.TOKEN, kv.slots(0)),
        m.Verdicts(kv.HANDOFF, landed=(0,)),
        m.Commit(kv.HANDOFF, b"d" * 16, kv.FIRST_TOKEN, 10, 1),
        m.Ack(kv.HANDOFF),
        m.Incomplete(kv.HANDOFF, 1, (0,)),
        m.Abort(kv.HANDOFF, TransferCode.ABORTED, "why"),
        m.AbortAck(kv.HANDOFF),
        m.Renew(kv.HANDOFF, 1.0),
        m.Renewed(kv.HANDOFF, 1.0),
        m.PeerLost("gone"),
        m.GiveUp("enough"),
        m.Open("tcp"),
        m.BlocksReady((0,)),
        m.BlocksSent(((0, kv.checksum(0)),)),
        m.LinkLost("reset"),
        m.Finish(kv.FIRST_TOKEN),
        m.Quiet(),
        m.SlotsReserved(kv.slots(0, 1, 2)),
        m.SlotsRefused(TransferCode.NO_CAPACITY, "full"),
        m.LandingEnded(broken=(0,)),
        m.Adopted(),
        m.AdoptFailed(TransferCode.INTERNAL, "no"),
    )
}
TIMEOUTS = (m.ReserveOverdue, m.LeaseExpired, m.AckOverdue, m.PatienceOver, m.HandoffOverdue)


def make_sender() -> Sender:
    return Sender(kv.HANDOFF, kv.names(3), 40, block_bytes=kv.BLOCK_BYTES)


def make_receiver() -> Receiver:
    return Receiver(kv.HANDOFF, token=kv.TOKEN, block_bytes=kv.BLOCK_BYTES)


MACHINES = [
    pytest.param(make_sender, SENDER, SenderState, id="sender"),
    pytest.param(make_receiver, RECEIVER, ReceiverState, id="receiver"),
]


def cells(table: Table[Any]) -> Iterator[tuple[Any, type[m.Event], Any]]:
    for state, row in table.items():
        for event, rules in row.items():
            for rule in rules:
                yield state, event, rule


def test_the_list_of_events_above_is_complete() -> None:
    # By name: a class with slots is made twice, and the first one lingers.
    concrete = {kind.__name__ for kind in (*m.PeerMessage.__subclasses__(), *m.LocalEvent.__subclasses__())}
    assert {kind.__name__ for kind in EVENTS} == concrete - {"Timeout"}
    assert {kind.__name__ for kind in TIMEOUTS} == {kind.__name__ for kind in m.Timeout.__subclasses__()}


@pytest.mark.parametrize(("make", "table", "states"), MACHINES)
def test_every_name_in_the_table_is_a_method(make: Any, table: Table[Any], states: Any) -> None:
    machine = make()
    assert set(table) == set(states)
    for _, _, rule in cells(table):
        assert all(callable(getattr(machine, f"_do_{action}")) for action in rule.do)
        assert rule.when is None or callable(getattr(machine, f"_is_{rule.when}"))


@pytest.mark.parametrize(("make", "table", "states"), MACHINES)
def test_every_method_is_in_the_table(make: Any, table: Table[Any], states: Any) -> None:
    named = {f"_do_{action}" for _, _, rule in cells(table) for action in rule.do}
    assert {name for name in dir(make()) if name.startswith("_do_")} == named


@pytest.mark.parametrize(("make", "table", "states"), MACHINES)
def test_every_state_can_be_reached_and_only_the_last_ones_are_final(make: Any, table: Table[Any], states: Any) -> None:
    reached = {states.IDLE}
    while more := {rule.to for state, _, rule in cells(table) if state in reached} - reached:
        reached |= more
    assert reached == set(states)
    final = {state for state in states if all(rule.to is state for rules in table[state].values() for rule in rules)}
    assert final == {state for state in states if state.name in ("ACKED", "FAILED", "CLOSED")}


@pytest.mark.parametrize(("make", "table", "states"), MACHINES)
def test_an_event_without_a_cell_raises_and_changes_nothing(make: Any, table: Table[Any], states: Any) -> None:
    num_illegal = 0
    for state in states:
        for kind, event in EVENTS.items():
            if kind in table[state]:
                continue
            machine: Machine[Any] = make()
            machine.state = state
            before = copy.deepcopy(vars(machine))
            with pytest.raises(RemoteProtocolError if isinstance(event, m.PeerMessage) else LocalProtocolError):
                machine.receive(event, 1.0)
            assert vars(machine) == before
            num_illegal += 1
    assert num_illegal > len(states)


@pytest.mark.parametrize(("make", "table", "states"), MACHINES)
@pytest.mark.parametrize("kind", TIMEOUTS)
def test_timeouts_cannot_be_reported_from_outside(make: Any, table: Any, states: Any, kind: type[m.Timeout]) -> None:
    with pytest.raises(LocalProtocolError):
        make().receive(kind(), 1.0)


OTHERS = [
    pytest.param(HandoffId(HandoffKey("req-2", 1), kv.SENDER, kv.RECEIVER), id="request"),
    pytest.param(HandoffId(HandoffKey("req-1", 2), kv.SENDER, kv.RECEIVER), id="attempt"),
    pytest.param(
        HandoffId(kv.HANDOFF.key, WorkerIdentity("prefill-0", "c" * 32), kv.RECEIVER), id="sender incarnation"
    ),
    pytest.param(HandoffId(kv.HANDOFF.key, kv.SENDER, WorkerIdentity("decode-0", "c" * 32)), id="receiver incarnation"),
    pytest.param(HandoffId(kv.HANDOFF.key, kv.RECEIVER, kv.SENDER), id="direction"),
]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("make", "table", "states"), MACHINES)
def test_a_message_with_another_fence_is_refused_in_every_state(
    make: Any, table: Any, states: Any, other: HandoffId
) -> None:
    for state in states:
        for event in EVENTS.values():
            if not isinstance(event, m.PeerMessage):
                continue
            machine: Machine[Any] = make()
            machine.state = state
            before = copy.deepcopy(vars(machine))
            fields = {name: getattr(event, name) for name in type(event).__dataclass_fields__}
            with pytest.raises(Fenced):
                machine.receive(type(event)(**{**fields, "handoff": other}), 1.0)
            assert vars(machine) == before


@pytest.mark.parametrize("other", OTHERS)
def test_digests_of_different_handoffs_differ(other: HandoffId) -> None:
    assert other.digest != kv.HANDOFF.digest
    assert len(other.digest) == 16


def test_digests_do_not_run_parts_together() -> None:
    one = HandoffId(HandoffKey("a", 11), kv.SENDER, kv.RECEIVER)
    two = HandoffId(HandoffKey("a1", 1), kv.SENDER, kv.RECEIVER)
    assert one.digest != two.digest
