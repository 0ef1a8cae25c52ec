"""How often a handoff asks the other side over gRPC: each time is a round trip that somebody waits for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from helpers.kv_agents import Prompt, hand_over, running

from baton.kvtransfer.service import KVTransferClient

CALLS = ("handshake", "reserve", "commit", "abort", "heartbeat")


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
async def test_a_handoff_takes_two_calls_and_the_first_of_a_pair_three(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[str] = Counter()
    for name in CALLS:
        original = getattr(KVTransferClient, name)

        async def counted(self: Any, *args: Any, _name: str = name, _original: Any = original) -> Any:
            made[_name] += 1
            return await _original(self, *args)

        monkeypatch.setattr(KVTransferClient, name, counted)
    async with running("prefill-0", transports=transport) as sender, running("decode-0", transports=transport) as node:
        await hand_over(sender, node, Prompt([3, 5, 7], request_id="first"))
        assert made == {"handshake": 1, "reserve": 1, "commit": 1}
        made.clear()
        await hand_over(sender, node, Prompt([1, 2, 4, 6], request_id="second"))
        assert made == {"reserve": 1, "commit": 1}
