"""Asking a peer for blocks that it holds. It answers with an ordinary handoff to whoever asked.

A handoff that was asked for has no first token, since nobody computed anything: it is committed with ``NO_TOKEN``. All else
is as it always is: the grant, the leases, the checksums, the digest, the fences. So there is one machine and one set of
rules for a block that moves, whoever wanted it to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.kvtransfer.identity import HandoffId
from baton.kvtransfer.messages import FirstToken

NO_TOKEN = FirstToken(-1)
"""Stands where a first token would, in a handoff that moves cached blocks. It does not exist on the wire."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Give me these. ``handoff.receiver`` asks ``handoff.sender``."""

    handoff: HandoffId
    receiver_address: str  # host:port of the asking worker's gRPC services
    block_names: tuple[bytes, ...]  # full blocks of one chain, from its first
    time_left_s: float  # after this nobody wants them any more


class BlockHolder(Protocol):
    """What a worker does when a peer asks for its blocks. Called on the event loop."""

    async def pin(self, handoff: HandoffId, block_names: Sequence[bytes]) -> Sequence[int]:
        """Ids of the longest leading run of these blocks that is here. They keep their contents until ``unpin``.

        Empty: the first one is not here, and nothing is pinned. Raises TransferError to refuse.
        """
        ...

    def unpin(self, handoff: HandoffId) -> None:
        """Nothing reads the blocks any more. Once for every ``pin`` that returned some."""
        ...
