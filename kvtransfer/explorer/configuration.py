"""What is explored: how many handoffs, blocks and faults, and how the handoffs belong together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity

PREFILL = "P"
DECODE = "D"


class Scenario(StrEnum):
    """How the handoffs of a run belong together."""

    REQUESTS = "requests"  # different requests at the same time; their first block is the same
    ATTEMPTS = "attempts"  # one request, tried again after it failed
    REBORN = "reborn"  # one request and one attempt number, again, after a worker was replaced


class Fault(StrEnum):
    """What the budget is spent on. Delay and reordering cost nothing: every message waits as long as it likes."""

    DROP = "a message is lost"
    DUPLICATE = "a message arrives twice"
    TIMEOUT = "a timer runs out although something could still happen"
    CANCEL = "the client leaves"
    CRASH = "a worker dies"
    LINK = "the data connection breaks"
    CORRUPT = "a block arrives corrupt"
    BENT = "a frame or commit arrives with other fields"
    STRAY = "a frame arrives again later"
    REFUSAL = "the host refuses"
    PARTITION = "a worker takes the other for lost"
    SLOW = "the transport is slow to report what it sent"


@dataclass(frozen=True, slots=True)
class Configuration:
    """One exploration. ``pool_blocks`` of the receiver are fewer than all handoffs need, so that slots are reused at once."""

    scenario: Scenario
    num_handoffs: int = 2
    num_blocks: int = 3
    pool_blocks: int = 3
    max_faults: int = 2
    faults: frozenset[Fault] = frozenset(Fault)

    def __post_init__(self) -> None:
        if not 1 <= self.num_blocks <= self.pool_blocks or self.num_handoffs < 1 or self.max_faults < 0:
            raise ValueError(f"{self} has nothing to hand over, or no room for it")

    def __str__(self) -> str:
        return (
            f"{self.scenario.value}: 2 peers and a gateway, {self.num_handoffs} handoffs of {self.num_blocks} blocks, "
            f"a pool of {self.pool_blocks}, at most {self.max_faults} faults"
        )

    def handoff(self, number: int, prefill_lives: int, decode_lives: int) -> HandoffId:
        """Handoff ``number`` between two processes, each named by how often its worker was replaced."""
        request = number if self.scenario is Scenario.REQUESTS else 0
        attempt = number + 1 if self.scenario is Scenario.ATTEMPTS else 1
        sender = WorkerIdentity(PREFILL, f"{PREFILL}{prefill_lives}")
        receiver = WorkerIdentity(DECODE, f"{DECODE}{decode_lives}")
        return HandoffId(HandoffKey(f"r{request}", attempt), sender, receiver)

    def block_names(self, number: int) -> tuple[bytes, ...]:
        """Handoffs of one request bring the same blocks; those of several share the first one."""
        request = number if self.scenario is Scenario.REQUESTS else 0
        return tuple(b"%02d/%02d" % (request if index else 0, index) for index in range(self.num_blocks))


def required(max_faults: int = 2, num_blocks: int = 3, num_handoffs: int = 2) -> tuple[Configuration, ...]:
    """What ``make explore`` goes through."""
    return (
        *(Configuration(scenario, num_handoffs, num_blocks, num_blocks, max_faults) for scenario in Scenario),
        # Room for both: they run side by side.
        Configuration(Scenario.REQUESTS, num_handoffs, 1, num_handoffs, max_faults),
    )
