"""Whether this gateway can serve: what ``GET /ready`` says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.services.core.router import Role, WorkerView


class Readiness:
    """Ready from the first usable pair on, as long as any decode worker is there: without a pair it prefills itself.

    Before the first pair a decode worker alone is not enough, or a new installation would take its first load without
    its prefill pool.
    """

    def __init__(self, *, needs_pair: Callable[[], bool] = lambda: True) -> None:
        """``needs_pair``: False while decode workers are meant to prefill themselves."""
        self._needs_pair = needs_pair
        self._has_seen_pair = False

    def check(self, views: Sequence[WorkerView]) -> tuple[bool, str]:
        """Whether the usable workers can serve, and why not, or what is lost if they can."""
        if any(view.role is Role.COLOCATED for view in views):
            return True, ""
        prefill = {view.compatibility for view in views if view.role is Role.PREFILL}
        decode = {view.compatibility for view in views if view.role is Role.DECODE}
        if not decode:
            return False, f"no decode worker is ready ({len(views)} other workers are)"
        if prefill & decode:
            self._has_seen_pair = True
            return True, ""
        if not self._needs_pair():
            return True, ""
        problem = "no prefill worker is ready"
        if prefill:
            problem = "no prefill worker can exchange blocks with a decode worker: /v1/workers shows how they differ"
        if self._has_seen_pair:
            return True, f"degraded: {problem}; decode workers prefill themselves"
        return False, problem
