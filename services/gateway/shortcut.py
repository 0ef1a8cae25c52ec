"""Plain tokens on a shorter way: what a stream's reader would do with them is done for it while it waits.

Waking the reader of a stream, through everything that waits for each other there, takes longer than what it then does with a
token. Both ways lead through the same ladder, assembler and renderer, which are told of each token once, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from baton.services.gateway.choice import ChoicePiece
from baton.services.gateway.outlet import Outlet
from baton.services.runtime.token_columns import TokenRow


class Rendered(NamedTuple):
    """How pieces become events, and what those leave through."""

    render: Callable[[ChoicePiece], bytes]
    outlet: Outlet


class Shortcut:
    """From the tokens of one choice to its client."""

    __slots__ = ("_outlet", "_piece_of", "_render")

    def __init__(self, piece_of: Callable[[TokenRow], ChoicePiece], rendered: Rendered) -> None:
        """``piece_of``: what the reader makes of tokens in the middle of a generation."""
        self._piece_of = piece_of
        self._render, self._outlet = rendered

    @property
    def is_open(self) -> bool:
        """Everything that came before is on its way to the client."""
        return self._outlet.is_open

    def take(self, row: TokenRow) -> None:
        """Only while it is open, and the reader waits for these tokens."""
        if data := self._render(self._piece_of(row)):
            self._outlet.write(data)
