"""What a request is promised in time: its class, its targets, and whose share of the machines it takes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SloClass(StrEnum):
    """How urgent a request is."""

    INTERACTIVE = "interactive"  # somebody watches every token
    STANDARD = "standard"  # somebody waits for the answer
    BATCH = "batch"  # nobody waits: it takes what the others leave, and gives way to them


@dataclass(frozen=True, slots=True)
class Targets:
    """Milliseconds to the first token, and for each one after it. None: no target."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None


# What a class promises unless the request says otherwise.
CLASS_TARGETS = {
    SloClass.INTERACTIVE: Targets(1_000.0, 100.0),
    SloClass.STANDARD: Targets(5_000.0, 250.0),
    SloClass.BATCH: Targets(),
}

MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """A request's promise as a worker sees it. Times are on the worker's own monotonic clock."""

    slo_class: SloClass = SloClass.STANDARD
    next_token_due_s: float | None = None  # when its next token is late: the first one, or that after a resumption
    tpot_s: float | None = None
    tenant: str = ""
    weight: float = 1.0  # of the tenant, against others of the class
    priority: int = 0  # among the tenant's own that wait in the class: the lowest first

    @property
    def is_batch(self) -> bool:
        return self.slo_class is SloClass.BATCH
