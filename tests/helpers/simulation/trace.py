"""What happened in a run, in order: for people who look at a failing seed, and to show that a replay is the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog
from helpers.simulation.clock import Process, owner

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_DULL = {"level", "event", "exc_info"}


class Trace:
    """Lines of time, place and event. ``counts`` is kept in any case, the lines only if wanted."""

    def __init__(self, clock: Callable[[], float], *, keep: bool) -> None:
        self.lines: list[str] = []
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []  # what production code logged as an error
        self.is_kept = keep
        self._clock = clock

    def note(self, where: Process | str, what: str) -> None:
        if self.is_kept:
            self.lines.append(f"{self._clock():11.6f}  {where!s:<11} {what}")

    def text(self) -> str:
        return "\n".join(self.lines)

    def on_log(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A structlog processor: the system's own log lines are part of the trace, and go nowhere else."""
        name = str(event["event"])
        self.counts[name] += 1
        if method in ("error", "exception", "critical") or self.is_kept:
            fields = " ".join(f"{key}={value}" for key, value in event.items() if key not in _DULL)
            fields = _ADDRESS.sub("", fields)  # the same in every run
            error = event.get("exc_info")
            if isinstance(error, BaseException):
                fields += f" {error!r}"
            where = owner()
            if method in ("error", "exception", "critical"):
                self.errors.append(f"{where}: {name} {fields}")
            self.note(where, f"[{method}] {name} {fields}")
        raise structlog.DropEvent
