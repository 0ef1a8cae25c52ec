"""Blocks handed over inside one process: whose rows a ticket stands for, and for how long."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.kv_agents import LAYOUT

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.mapping import host_id
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.transport.base import Offer
from baton.kvtransfer.transport.inproc import InprocTransport


def transport(executor: ThreadPoolExecutor, block_bytes: int = LAYOUT.block_bytes) -> InprocTransport:
    return InprocTransport(HostBlockMemory(4, block_bytes), executor)


def refusal(ours: InprocTransport, **tickets: bytes) -> str:
    with pytest.raises(TransferError) as caught:
        ours.attach(Offer(host_id(), None, tickets))
    assert caught.value.code is TransferCode.INCOMPATIBLE
    return caught.value.message


def test_a_ticket_stands_for_the_rows_of_the_agent_that_gave_it() -> None:
    with ThreadPoolExecutor(1) as executor:
        theirs, others, ours = (transport(executor) for _ in range(3))
        assert ours.attach(Offer(host_id(), None, {"inproc": theirs.offer()})) is theirs._memory.rows
        assert ours.attach(Offer(host_id(), None, {"inproc": others.offer()})) is others._memory.rows


def test_a_peer_elsewhere_has_no_rows_here() -> None:
    with ThreadPoolExecutor(1) as executor:
        ours = transport(executor)
        assert refusal(ours) == "inproc: the peer is another process"
        assert refusal(ours, inproc=bytes(16)) == "inproc: the peer is another process"
        assert refusal(ours, shm=transport(executor).offer()) == "inproc: the peer is another process"


def test_blocks_of_another_size_are_refused_with_both_sizes() -> None:
    with ThreadPoolExecutor(1) as executor:
        theirs, ours = transport(executor, 2 * LAYOUT.block_bytes), transport(executor)
        expected = f"inproc: rows of {2 * LAYOUT.block_bytes} bytes there, {LAYOUT.block_bytes} here"
        assert refusal(ours, inproc=theirs.offer()) == expected


def test_rows_that_are_gone_are_not_kept_alive_by_their_ticket() -> None:
    with ThreadPoolExecutor(1) as executor:
        theirs, ours = transport(executor), transport(executor)
        ticket = theirs.offer()
        del theirs
        gc.collect()
        assert refusal(ours, inproc=ticket) == "inproc: the peer is another process"
