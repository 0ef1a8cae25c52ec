"""A prefill worker takes no blocks in yet: every handoff to it is refused."""

from __future__ import annotations

from collections.abc import Sequence

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity
from baton.kvtransfer.messages import FirstToken, Slot, TransferReport


class NothingToReceive:
    """A ReceiverHost that was told of no handoff, and so grants none."""

    async def reserve(
        self, key: HandoffKey, sender: WorkerIdentity, block_names: Sequence[bytes], num_tokens: int
    ) -> Sequence[Slot]:
        raise TransferError(TransferCode.UNKNOWN_HANDOFF, f"{key}: this worker receives no blocks")

    async def committed(self, key: HandoffKey, first_token: FirstToken, report: TransferReport) -> None:
        raise TransferError(TransferCode.UNKNOWN_HANDOFF, f"{key}: this worker receives no blocks")

    async def released(self, key: HandoffKey, error: TransferError, quiet: bool) -> None:
        """Nothing was granted, so nothing comes back."""
