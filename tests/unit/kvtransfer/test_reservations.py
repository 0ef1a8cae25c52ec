"""A receiver that waits for room says that it lives; one that says nothing is found lost long before the wait is over."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from helpers import kv_names as kv
from helpers.kv_agents import FIRST_TOKEN, Node, Prompt, assert_arrived, open_handoff, options, running
from helpers.kv_raw_peer import raw_peer, scripted_receiver
from helpers.waiting import eventually

from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.reservations import OpenReservations
from baton.kvtransfer.service import KVTransferServicer

GRANT = m.Grant(kv.HANDOFF, kv.slots(0), 15.0, kv.TOKEN)
RESERVE = m.Reserve(kv.HANDOFF, kv.names(1), 16, "tcp")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often receivers were asked for slots, by the time they were given for an answer."""
    counts: Counter[int] = Counter()
    original = KVTransferServicer.Reserve

    async def counted(self: Any, request: pb.ReserveRequest, context: Any) -> pb.ReserveResponse:
        counts[request.answer_within_ms] += 1
        return await original(self, request, context)

    monkeypatch.setattr(KVTransferServicer, "Reserve", counted)
    return counts


async def test_who_waits_for_room_is_asked_again_until_there_is_some(asked: Counter[int]) -> None:
    often = options(reserve_answer_s=0.02)
    async with running("prefill-0", options=often) as sender, running("decode-0", options=often) as receiver:
        sender.fill(1)
        prompt = Prompt([3, 5])
        receiver.host.room.clear()
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready(prompt.all_ready)
        await eventually(lambda: asked[20] >= 3, timeout_s=30)
        assert receiver.host.cancelled == []
        receiver.host.room.set()
        report = await handoff.commit(FIRST_TOKEN)
        assert_arrived(sender, receiver, prompt)
        assert report.num_blocks == 2
        assert len(receiver.agent._receiving._reservations) == 0


async def test_who_waits_for_its_announcement_is_asked_again_as_well(asked: Counter[int]) -> None:
    often = options(reserve_answer_s=0.02, expect_wait_s=60.0)
    async with running("prefill-0", options=often) as sender, running("decode-0", options=often) as receiver:
        prompt = Prompt([3, 5])
        handoff = sender.agent.open(prompt.spec(receiver))
        await eventually(lambda: asked[20] >= 3, timeout_s=30)
        receiver.agent.expect(prompt.key, sender.identity)
        handoff.blocks_ready(prompt.all_ready)
        await handoff.commit(FIRST_TOKEN)


async def test_asking_again_does_not_make_the_wait_for_an_announcement_longer() -> None:
    often = options(reserve_answer_s=0.02, expect_wait_s=0.5)
    async with running("prefill-0", options=often) as sender, running("decode-0", options=often) as receiver:
        error = await sender.agent.open(Prompt([3]).spec(receiver)).wait()
        assert error is not None
        assert error.code is TransferCode.UNKNOWN_HANDOFF


@pytest.mark.parametrize("versions", [(1, 2), (2, 1), (1, 1)])
async def test_between_two_of_which_one_is_of_version_1_one_question_waits(
    versions: tuple[int, int], asked: Counter[int]
) -> None:
    ours, theirs = (options(reserve_answer_s=0.01, newest_wire_version=version) for version in versions)
    async with running("prefill-0", options=ours) as sender, running("decode-0", options=theirs) as receiver:
        prompt = Prompt([3])
        receiver.host.room.clear()
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready(prompt.all_ready)
        await eventually(lambda: asked.total() == 1, timeout_s=30)
        await eventually(lambda: receiver.agent.stats().num_receiving == 1, timeout_s=30)
        receiver.host.room.set()
        await handoff.commit(FIRST_TOKEN)
        assert asked == {0: 1}


class Mute:
    """A receiver whose handshake is answered by an agent, and nothing else by anybody: stopped, or cut off without a word."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.num_asked = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = handler_call_details.method

        async def answer(request: bytes, context: object) -> bytes:
            if method.endswith("Handshake"):
                async with grpc.aio.insecure_channel(self.node.address) as channel:
                    response: bytes = await channel.unary_unary(method)(request)
                    return response
            self.num_asked += method.endswith("Reserve")
            await asyncio.get_running_loop().create_future()
            raise AssertionError("never")

        return grpc.unary_unary_rpc_method_handler(answer)


async def test_a_receiver_that_dies_without_a_word_costs_seconds_not_the_time_for_room() -> None:
    """The wait for room is an hour here; only the missing sign of life can end it."""
    patient = options(reserve_answer_s=0.05, rpc_timeout_s=60.0, limits={"reserve_timeout_s": 3600.0})
    async with running("prefill-0", options=patient) as sender, running("decode-0") as receiver:
        mute, server = Mute(receiver), grpc.aio.server()
        server.add_generic_rpc_handlers((mute,))  # type: ignore[arg-type]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        spec = Prompt([3]).spec(receiver, receiver_address=f"127.0.0.1:{port}")
        await sender.agent.probe(receiver.identity, spec.receiver_address)
        (pair,) = sender.agent._sending._pairs._pairs.values()
        client: Any = pair.result().client
        client._timeout_s = 0.2  # for shaking hands it was a minute
        error = await sender.agent.open(spec).wait()
        assert error is not None
        assert error.code is TransferCode.PEER_LOST
        assert error.retryable
        assert "DEADLINE_EXCEEDED" in error.message
        assert mute.num_asked == 1
        await server.stop(None)


async def test_a_sender_that_gives_up_between_two_questions_leaves_nothing_behind() -> None:
    often = options(reserve_answer_s=0.02)
    async with running("prefill-0", options=often) as sender, running("decode-0", options=often) as receiver:
        prompt = Prompt([3])
        receiver.host.room.clear()
        handoff = open_handoff(sender, receiver, prompt)
        await eventually(lambda: len(receiver.agent._receiving._reservations) == 1, timeout_s=30)
        await handoff.abort("a test")
        await eventually(lambda: receiver.host.cancelled == [prompt.key], timeout_s=30)
        await eventually(lambda: receiver.agent.stats().num_receiving == 0, timeout_s=30)


async def test_a_sender_that_died_between_two_questions_is_not_waited_for() -> None:
    brief = options(limits={"lease_s": 0.1})
    async with running("decode-0", options=brief) as node, raw_peer(node) as peer:
        await peer.shake_hands()
        handoff = peer.handoff()
        node.agent.expect(handoff.key, peer.identity)
        node.host.room.clear()
        receiving = node.agent._receiving
        assert await receiving.reserve(m.Reserve(handoff, kv.names(1), 16, "tcp"), 0.01) is None
        await eventually(lambda: node.host.cancelled == [handoff.key], timeout_s=30)
        assert len(receiving._reservations) == 0


async def test_a_receiver_that_closes_answers_those_who_wait() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        await peer.shake_hands()
        waiting = peer.handoff("waits for room"), peer.handoff("waits for its announcement")
        node.agent.expect(waiting[0].key, peer.identity)
        node.host.room.clear()
        asking = [
            asyncio.ensure_future(peer.client.reserve(m.Reserve(handoff, kv.names(1), 16, "tcp"), 60.0, 2))
            for handoff in waiting
        ]
        await eventually(lambda: len(node.agent._receiving._reservations) == 2, timeout_s=30)
        await node.agent._receiving.close()
        answers = await asyncio.gather(*asking)
        assert [type(answer) for answer in answers] == [m.Refuse, m.Refuse]


async def test_a_peer_that_is_still_looking_too_soon_is_not_asked_in_a_circle() -> None:
    """The answers come at once; the questions keep their pace."""
    pace_s, asked_s = 0.1, []

    async def answer(request: bytes, context: Any) -> bytes:
        asked_s.append(asyncio.get_running_loop().time())
        return pb.ReserveResponse(waiting=pb.Waiting()).SerializeToString()

    async with scripted_receiver(answer, reserve_answer_s=pace_s) as client:
        started_s = asyncio.get_running_loop().time()
        asking = asyncio.ensure_future(client.reserve(RESERVE, 60.0, 2))
        await eventually(lambda: len(asked_s) >= 4, timeout_s=30)
        asking.cancel()
    assert all(at_s - started_s > 0.99 * number * pace_s for number, at_s in enumerate(asked_s))


# By itself.


def looking(answer: asyncio.Future[m.Grant | m.Refuse]) -> Callable[[], Any]:
    async def look() -> m.Grant | m.Refuse:
        return await answer

    return look


async def test_two_calls_ask_about_one_search() -> None:
    reservations, answer = OpenReservations(60.0), asyncio.get_running_loop().create_future()
    asking = [asyncio.ensure_future(reservations.ask(b"f", looking(answer), 30.0)) for _ in range(2)]
    await eventually(lambda: len(reservations) == 1)
    answer.set_result(GRANT)
    assert await asyncio.gather(*asking) == [GRANT, GRANT]
    assert len(reservations) == 0


async def test_an_answer_that_comes_between_two_questions_is_kept_for_the_next() -> None:
    reservations, answer = OpenReservations(60.0), asyncio.get_running_loop().create_future()
    assert await reservations.ask(b"f", looking(answer), 0.001) is None
    answer.set_result(GRANT)
    assert await reservations.ask(b"f", looking(answer), 30.0) == GRANT


async def test_a_call_that_ends_takes_the_search_with_it() -> None:
    reservations, answer = OpenReservations(60.0), asyncio.get_running_loop().create_future()
    asking = [asyncio.ensure_future(reservations.ask(b"f", looking(answer), 30.0)) for _ in range(2)]
    await eventually(lambda: len(reservations) == 1)
    asking[0].cancel()
    with pytest.raises(TransferError, match="no longer looked for"):
        await asking[1]
    assert answer.cancelled()
    assert len(reservations) == 0
