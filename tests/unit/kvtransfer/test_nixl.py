"""Blocks read by NIXL. What it shares with other transports is in the tests that run with each; most need the library."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.kv_agents import (
    LAYOUT,
    Prompt,
    assert_arrived,
    hand_over,
    needs_nixl,
    options,
    running,
    two_nodes,
)
from helpers.waiting import eventually

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.transport.base import Offer
from baton.kvtransfer.transport.nixl import _OFFER, NixlTransport
from baton.kvtransfer.transport.registry import make_transports


def test_without_the_library_it_is_refused_and_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    memory = HostBlockMemory(2, 64)
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(
            TransferError, match=r"nixl: it is not installed .*pip install 'baton-llm\[nixl\]'"
        ) as caught:
            make_transports("nixl", memory, executor)
        assert caught.value.code is TransferCode.INCOMPATIBLE


def changed(offer: bytes, **fields: Any) -> bytes:
    names = ("magic", "name", "address", "num_rows", "row_bytes")
    values = dict(zip(names, _OFFER.unpack_from(offer), strict=True)) | fields
    return _OFFER.pack(*values.values()) + offer[_OFFER.size :]


@needs_nixl
async def test_offers_are_checked_before_anything_is_done_with_them() -> None:
    memory, other = HostBlockMemory(2, 64), HostBlockMemory(2, 64)
    with ThreadPoolExecutor(1) as executor:
        ours, theirs = NixlTransport(memory, executor), NixlTransport(other, executor)
        good = theirs.offer()
        for ticket, problem in [
            (None, "does not say where"),
            (b"", "an offer of 0 bytes"),
            (good[: _OFFER.size], f"an offer of {_OFFER.size} bytes"),
            (changed(good, magic=b"BATONNX2"), "another version"),
            (changed(good, row_bytes=128), "rows of 128 bytes there, 64 here"),
            (changed(good, num_rows=0), "0 rows at"),
            (changed(good, num_rows=2**32), f"{2**32} rows at"),
            (changed(good, address=2**64 - 64), "rows at 0xf"),
            (changed(good, name=b"x" * 32), "another agent than its own"),
            (good[: _OFFER.size] + bytes(100), "cannot be reached"),
            (changed(good, num_rows=10**6), "cannot be read"),
            (ours.offer(), "this very worker"),
        ]:
            tickets = {} if ticket is None else {"nixl": ticket}
            with pytest.raises(TransferError, match=problem):
                ours.attach(Offer("host", None, tickets))
        source = ours.attach(Offer("host", None, {"nixl": good}))  # and after all of that it still works
        again = ours.attach(Offer("host", None, {"nixl": good}))
        assert again is source
        ours.detach(source)
        assert len(ours._remotes) == 1
        ours.detach(again)
        assert ours._remotes == {}
        await ours.close()
        await theirs.close()


@needs_nixl
async def test_a_read_that_fails_makes_the_handoff_go_on_by_the_next_transport() -> None:
    quick = options(canary_bytes=LAYOUT.block_bytes)
    async with two_nodes(("nixl", "tcp"), options=quick) as (sender, receiver):
        assert (await hand_over(sender, receiver, Prompt([9], request_id="before"))).transport == "nixl"
        transport = receiver.agent._context.transports["nixl"]
        transport._agent.check_xfer_state = lambda handle: "ERR"  # type: ignore[attr-defined]
        transfer = transport._agent.transfer  # type: ignore[attr-defined]
        transport._agent.transfer = lambda handle: transfer(handle) and "PROC"  # type: ignore[attr-defined]
        prompt = Prompt([3, 1, 8])
        report = await hand_over(sender, receiver, prompt)
        assert_arrived(sender, receiver, prompt)
        assert report.transport == "tcp"
        assert report.fallbacks[0].startswith("nixl: ")


@needs_nixl
async def test_a_peer_that_is_gone_is_forgotten() -> None:
    quick = options(limits={"lease_s": 2.0}, heartbeat_s=0.2)
    async with running("decode-0", transports="nixl", options=quick) as receiver:
        async with running("prefill-0", transports="nixl", options=quick) as sender:
            await hand_over(sender, receiver, Prompt([1]))
            assert len(receiver.agent._context.transports["nixl"]._remotes) == 1  # type: ignore[attr-defined]
        await eventually(lambda: not receiver.agent._receiving._pairs, timeout_s=30)
        # On the transport's thread, so perhaps a moment later.
        await eventually(lambda: receiver.agent._context.transports["nixl"]._remotes == {})  # type: ignore[attr-defined]
