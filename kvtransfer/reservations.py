"""Reservations that take longer than one call may: kept between the calls that ask how they stand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import TransferCode, TransferError

Looking = Coroutine[Any, Any, m.Grant | m.Refuse]


class OpenReservations:
    """By the fence of their handoff. One that nobody has asked about for ``forget_after_s`` is cancelled."""

    def __init__(self, forget_after_s: float) -> None:
        self._forget_after_s = forget_after_s
        self._open: dict[bytes, _Reservation] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def ask(self, fence: bytes, look: Callable[[], Looking], within_s: float) -> m.Grant | m.Refuse | None:
        """The answer, or None when there is none within ``within_s``; ``look`` begins to look for one if nobody does yet.

        Cancelling a call ends the looking, as it does where there is only one call. Raises TransferError when that was done to
        another one, or on ``close``.
        """
        reservation = self._open.get(fence)
        if reservation is None:
            reservation = self._open[fence] = _Reservation(asyncio.create_task(look(), name="kv-reserve"))
        if reservation.expiry is not None:
            reservation.expiry.cancel()
        try:
            await asyncio.wait({reservation.looking}, timeout=within_s)
        except asyncio.CancelledError:
            self._forget(fence, reservation)
            raise
        if not reservation.looking.done():
            loop = asyncio.get_running_loop()
            reservation.expiry = loop.call_later(self._forget_after_s, self._forget, fence, reservation)
            return None
        self._forget(fence, reservation)
        if reservation.looking.cancelled():
            raise TransferError(TransferCode.ABORTED, "slots are no longer looked for")
        return reservation.looking.result()

    async def close(self) -> None:
        """Ends all of them."""
        open_reservations = list(self._open.items())
        for fence, reservation in open_reservations:
            self._forget(fence, reservation)
        if open_reservations:
            await asyncio.wait([reservation.looking for _, reservation in open_reservations])

    def _forget(self, fence: bytes, reservation: _Reservation) -> None:
        if reservation.expiry is not None:
            reservation.expiry.cancel()
        reservation.looking.cancel()
        if self._open.get(fence) is reservation:
            del self._open[fence]


@dataclass(slots=True, eq=False)
class _Reservation:
    looking: asyncio.Task[m.Grant | m.Refuse]
    expiry: asyncio.TimerHandle | None = None  # runs while nobody asks
