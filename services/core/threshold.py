"""From which prompt length on handing over is cheaper than prefilling on the decode worker: derived from prices, for people to
see. Nothing is decided by it: each request is priced by itself. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.services.core.candidates import Placement, Role, RoutedRequest, WorkerView
from baton.services.core.errors import BatonError
from baton.services.core.links import LinkView
from baton.services.core.router import route

_LONGEST = 1 << 20


def handover_threshold(
    workers: Sequence[WorkerView], links: LinkView, now: float, *, block_size: int, block_bytes: int
) -> int | None:
    """Tokens of the shortest new prompt for which a handoff is the cheaper way right now; None: it never is.

    The gap between the two prices grows with the length but for steps of the curves, so the first length of a doubling row
    that is handed over is taken, and halved from there.
    """
    if not any(worker.role is Role.PREFILL for worker in workers):
        return None

    def is_handed_over(num_tokens: int) -> bool:
        request = RoutedRequest("threshold", num_tokens, block_size, block_bytes, {})
        return route(request, workers, Placement.AUTO, links, now).chosen.prefill is not None

    try:
        high = 1
        while not is_handed_over(high):
            high *= 2
            if high > _LONGEST:
                return None
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            if is_handed_over(middle):
                high = middle
            else:
                low = middle
        return high
    except BatonError:
        return None  # nobody decodes
