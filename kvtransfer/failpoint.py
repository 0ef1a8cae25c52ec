"""Where a test may make the transfer fail: the points call ``reach`` or ``reach_async``, which do nothing unless hooked up.

A worker's process fills the hooks in when it was started with failpoints.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from baton.kvtransfer.errors import TransferCode, TransferError

hook: Callable[[str], None] | None = None
async_hook: Callable[[str], Awaitable[None]] | None = None


class TransferFailpoint(TransferError):
    """What the hooks raise where the operation is to fail."""

    def __init__(self, point: str) -> None:
        super().__init__(TransferCode.INTERNAL, f"failpoint {point}")


def reach(point: str) -> None:
    """Blocks the thread where the action is to wait."""
    if hook is not None:
        hook(point)


async def reach_async(point: str) -> None:
    """The same in a coroutine, which alone waits."""
    if async_hook is not None:
        await async_hook(point)
