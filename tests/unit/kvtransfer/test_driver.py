"""The shell of a machine: order of events, errors, timers."""

from __future__ import annotations

import asyncio

import pytest
from helpers import kv_names as kv
from helpers.waiting import eventually

from baton.kvtransfer import messages as m
from baton.kvtransfer.driver import Driver
from baton.kvtransfer.errors import Fenced, LocalProtocolError, TransferCode
from baton.kvtransfer.identity import HandoffId, HandoffKey
from baton.kvtransfer.protocol import HandoffLimits, SenderState
from baton.kvtransfer.sender import Sender

GRANT = m.Grant(kv.HANDOFF, kv.slots(0), 15.0, kv.TOKEN)


class Setup:
    """A driven sender; ``replies`` are fed while the command of that kind is performed."""

    def __init__(self, limits: HandoffLimits | None = None) -> None:
        self.now = 0.0
        self.performed: list[m.Command] = []
        self.replies: dict[type[m.Command], m.Event] = {}
        self.machine = Sender(kv.HANDOFF, kv.names(1), 16, block_bytes=1, limits=limits)
        self.driver = Driver(self.machine, self.perform, lambda: self.now)

    def perform(self, command: m.Command) -> None:
        self.performed.append(command)
        reply = self.replies.pop(type(command), None)
        if reply is not None:
            self.driver.feed(reply)


async def test_events_that_come_while_commands_are_performed_wait_their_turn() -> None:
    setup = Setup()
    setup.replies = {m.Send: GRANT, m.PushBlocks: m.BlocksSent(((0, 1),))}
    setup.driver.feed(m.BlocksReady((0,)))
    setup.driver.feed(m.Open("tcp"))
    assert [type(command) for command in setup.performed] == [m.Send, m.PushBlocks]
    assert setup.machine.state is SenderState.PUSHING
    setup.driver.feed(m.GiveUp("enough"))


async def test_what_was_refused_raises_and_what_came_after_it_is_still_taken() -> None:
    setup = Setup()
    setup.driver.feed(m.BlocksReady((0,)))
    with pytest.raises(LocalProtocolError):
        setup.driver.feed(m.BlocksReady((1,)))
    other = HandoffId(HandoffKey("another", 1), kv.SENDER, kv.RECEIVER)
    with pytest.raises(Fenced):
        setup.driver.feed(m.Refuse(other, TransferCode.ABORTED, "not ours"))
    assert setup.machine.state is SenderState.IDLE


async def test_a_peer_that_breaks_the_protocol_ends_the_handoff() -> None:
    setup = Setup()
    setup.driver.feed(m.Open("tcp"))
    setup.driver.feed(m.Ack(kv.HANDOFF))
    assert setup.machine.error is not None
    assert setup.machine.error.code is TransferCode.PROTOCOL


async def test_what_is_due_comes_before_what_arrives() -> None:
    setup = Setup()
    setup.driver.feed(m.Open("tcp"))
    setup.now = 60.0
    setup.driver.feed(GRANT)
    assert setup.machine.state is SenderState.FAILED


async def test_the_timer_fires_by_itself_follows_the_deadline_and_ends_with_the_machine() -> None:
    setup = Setup(HandoffLimits(reserve_timeout_s=0.05, max_handoff_s=1000.0))
    loop = asyncio.get_running_loop()
    start = loop.time()
    setup.driver._clock = loop.time
    setup.driver.feed(m.Open("tcp"))
    await eventually(lambda: setup.machine.state is SenderState.FAILED)
    assert loop.time() - start >= 0.05
    assert setup.driver._timer is None


async def test_a_deadline_that_moves_closer_moves_the_timer() -> None:
    setup = Setup(HandoffLimits(reserve_timeout_s=1000.0, max_handoff_s=1000.0))
    setup.driver._clock = asyncio.get_running_loop().time
    setup.driver.feed(m.Open("tcp"))
    setup.driver.feed(m.Grant(kv.HANDOFF, kv.slots(0), 0.02, kv.TOKEN))
    await eventually(lambda: setup.machine.state is SenderState.SETTLING)
