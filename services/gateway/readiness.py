"""Whether this gateway can serve: what ``GET /ready`` says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.services.core.links import LinkMatrix, LinkState, PairKey
from baton.services.core.router import Role, WorkerView


class Readiness:
    """Ready from the first pair on that a canary has come through, as long as any decode worker is there: without a pair it
    prefills itself.

    Before the first pair a decode worker alone is not enough, or a new installation would take its first load without
    its prefill pool.
    """

    def __init__(self, *, needs_pair: Callable[[], bool] = lambda: True, links: LinkMatrix | None = None) -> None:
        """``needs_pair``: False while decode workers are meant to prefill themselves. Without ``links`` every pair will do."""
        self._links = links
        self._needs_pair = needs_pair
        self.has_seen_pair = False

    def check(self, views: Sequence[WorkerView]) -> tuple[bool, str]:
        """Whether the usable workers can serve, and why not, or what is lost if they can."""
        if any(view.role is Role.COLOCATED for view in views):
            return True, ""
        prefill = [view for view in views if view.role is Role.PREFILL]
        decode = [view for view in views if view.role is Role.DECODE]
        is_any_pair = any(one.exchanges_blocks_with(other) for one in prefill for other in decode)
        if not decode:
            return False, f"no decode worker is ready ({len(views)} other workers are)"
        problem = self._problem_of_pairs(views)
        if is_any_pair and problem is None:
            self.has_seen_pair = True
            return True, ""
        if not self._needs_pair():
            return True, ""
        if not prefill:
            problem = "no prefill worker is ready"
        elif not is_any_pair:
            problem = "no prefill worker can exchange blocks with a decode worker: /v1/workers shows how they differ"
        if self.has_seen_pair:
            return True, f"degraded: {problem}; decode workers prefill themselves"
        return False, problem or ""

    def _problem_of_pairs(self, views: Sequence[WorkerView]) -> str | None:
        """None: blocks can go from a prefill to a decode worker."""
        if self._links is None:
            return None
        problem = ""
        for prefill in views:
            for decode in views:
                if (prefill.role, decode.role) != (Role.PREFILL, Role.DECODE):
                    continue
                if not prefill.exchanges_blocks_with(decode):
                    continue
                link = self._links.get(PairKey(prefill.incarnation, decode.incarnation))
                if link.state in (LinkState.VERIFIED, LinkState.UNVERIFIED):
                    return None
                what = link.reason or "no canary has come through yet"
                problem = problem or f"no usable pair: {prefill.worker_id} to {decode.worker_id}: {what}"
        return problem
