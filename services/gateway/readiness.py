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
        pair = _first_pair(prefill, decode)
        is_any_pair = pair is not None
        if not decode:
            return False, f"no decode worker is ready ({len(views)} other workers are)"
        problem = None if pair is None else self._problem_of_pairs(prefill, decode, pair)
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

    def _problem_of_pairs(
        self, prefill: Sequence[WorkerView], decode: Sequence[WorkerView], pair: tuple[WorkerView, WorkerView]
    ) -> str | None:
        """None: blocks can go from a prefill to a decode worker. ``pair``: two that would exchange them."""
        if self._links is None:
            return None
        others = {other.incarnation: other for other in decode}
        for one in prefill:
            for incarnation, link in self._links.row(one.incarnation).items():
                other = others.get(incarnation)
                is_well = link.state in (LinkState.VERIFIED, LinkState.UNVERIFIED)
                if is_well and other is not None and one.exchanges_blocks_with(other):
                    return None
        key = PairKey(pair[0].incarnation, pair[1].incarnation)
        what = self._links.get(key).reason or "no canary has come through yet"
        return f"no usable pair: {pair[0].worker_id} to {pair[1].worker_id}: {what}"


def _first_pair(prefill: Sequence[WorkerView], decode: Sequence[WorkerView]) -> tuple[WorkerView, WorkerView] | None:
    """Two that exchange blocks. Of a thousand workers a few kinds are compared."""
    kinds = {(other.compatibility, other.wire_versions): other for other in reversed(decode)}
    tried = set()
    for one in prefill:
        kind = one.compatibility, one.wire_versions
        if kind in tried:
            continue
        tried.add(kind)
        for other in kinds.values():
            if one.exchanges_blocks_with(other):
                return one, other
    return None
