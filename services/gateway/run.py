"""One generation on its way through the workers, as the dispatcher keeps it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.services.core.ladder import Ladder
from baton.services.core.ladder_steps import End
from baton.services.core.links import PairKey
from baton.services.gateway.generation import GenerationRequest
from baton.services.gateway.mailbox import Mailbox
from baton.services.gateway.receipts import GenerationRecord
from baton.services.gateway.worker_link import Arrival, WorkerLink
from baton.services.runtime.token_columns import TokenRow


@dataclass(slots=True, eq=False)
class Run:
    """Its ladder, and what the ladder's words mean here."""

    request: GenerationRequest
    record: GenerationRecord
    ladder: Ladder
    deadline_s: float | None
    clock: Callable[[], float]
    block_names: list[bytes] = field(default_factory=list)
    arrivals: Mailbox[Arrival | None] = field(default_factory=Mailbox)  # None: it may be time
    links: dict[tuple[int, str], WorkerLink] = field(default_factory=dict)  # by attempt and incarnation, until released
    sent_s: float = 0.0  # the attempt under way
    fetching: PairKey | None = None  # the holder of blocks that are fetched, and who needs them, while that is going on
    is_from_start: bool = True  # that attempt began without generated tokens
    block_size: int = 16
    told_cached_tokens: int | None = None
    end: End | None = None
    own_end: str = "abort"  # what it means when the caller closes the generation
    timer: asyncio.TimerHandle | None = None
    timer_s: float = -math.inf  # what the timer is set for

    def stop_timer(self) -> None:
        """If there is one."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer, self.timer_s = None, -math.inf

    @property
    def has_told_cached_tokens(self) -> bool:
        """What is known of them by now."""
        return self.told_cached_tokens == self.record.cached_tokens

    def take_next(self, arrival: Arrival, row: TokenRow) -> bool:
        """Counts tokens in the middle of the generation, which are to be passed on. False: they are something else."""
        if not self.ladder.take_next(arrival.attempt, arrival.link.incarnation, row.first_index, row.token_ids):
            return False
        if self.record.completion_tokens == 1:
            self.record.second_token_s = self.clock()
        self.record.completion_tokens += len(row.token_ids)
        return True

    def take(self, arrival: Arrival | None) -> bool:
        """Passes tokens on by the request's shortcut. False: they cannot go there, and nothing has changed."""
        if arrival is None or (row := arrival.tokens) is None:
            return False
        shortcut = self.request.shortcut
        if shortcut is None or not shortcut.is_open or not self.has_told_cached_tokens:
            return False
        if not self.take_next(arrival, row):
            return False
        shortcut.take(row)
        return True
