"""The receiving side's half of handoffs: which blocks a transfer fills, for whom, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import Hold, Owner
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.scheduler.base import Reservation, Slot
from baton.services.core.scheduler.block_tables import BlockTables, Plan, Sequence


class IncomingState(Enum):
    """Where a handoff stands on the receiving side."""

    QUEUED = "queued"  # waits for room
    GRANTED = "granted"  # the transfer fills the blocks
    ORPHANED = "orphaned"  # the request has ended; the transfer has not let go yet
    QUARANTINED = "quarantined"  # the transfer gave up, but a write could still land


@dataclass(slots=True, eq=False)
class Incoming:
    """One handoff, from the reservation until its blocks are a request's, or free."""

    sequence: Sequence
    hold: Hold
    requested_s: float
    state: IncomingState = IncomingState.QUEUED
    block_ids: list[int] = field(default_factory=list)  # the blocks to fill
    first_index: int = 0  # of the first of them in the prompt


class IncomingHandoffs:
    """All of them, by request id and attempt. Handoffs may outlive their requests, and overlap with the next attempt."""

    def __init__(self, pool: BlockPool, tables: BlockTables, lease_s: float) -> None:
        self._pool = pool
        self._tables = tables
        self._lease_s = lease_s
        self._handoffs: dict[tuple[str, int], Incoming] = {}

    def open(self, sequence: Sequence, now: float) -> Incoming:
        request = sequence.request
        key = (request.request_id, request.attempt)
        if key in self._handoffs:
            raise BatonError(ErrorCode.HANDOFF_FAILED, f"attempt {key[1]} of request {key[0]} has a handoff already")
        level = request.service
        hold = Hold(Owner.TRANSFER, f"{request.request_id}/{request.attempt}", tenant=level.tenant, weight=level.weight)
        incoming = self._handoffs[key] = Incoming(sequence, hold, now)
        return incoming

    def of(self, sequence: Sequence) -> Incoming | None:
        """The queued or granted handoff of a live request."""
        incoming = self._handoffs.get((sequence.request.request_id, sequence.request.attempt))
        if incoming is None or incoming.sequence is not sequence:
            return None
        return incoming if incoming.state in (IncomingState.QUEUED, IncomingState.GRANTED) else None

    def find(self, request_id: str, attempt: int | None) -> list[Incoming]:
        """Handoffs of a request: of one attempt, or all."""
        if attempt is not None:
            incoming = self._handoffs.get((request_id, attempt))
            return [] if incoming is None else [incoming]
        return [incoming for key, incoming in self._handoffs.items() if key[0] == request_id]

    def grant(self, incoming: Incoming, plan: Plan, now: float) -> Reservation:
        """Give the transfer what the plan allocates; the request pins the hits meanwhile."""
        sequence = incoming.sequence
        incoming.block_ids = self._tables.admit(sequence, plan, incoming.hold)
        incoming.hold.deadline_s = now + self._lease_s
        incoming.state = IncomingState.GRANTED
        first = incoming.first_index = len(plan.hits)
        return Reservation(
            request=sequence.request,
            slots=tuple(
                Slot(index, block_id, self._pool.generation(block_id))
                for index, block_id in enumerate(incoming.block_ids, start=first)
            ),
            num_held_blocks=first,
            num_cached_tokens=sequence.request.num_cached_tokens,
            requested_s=incoming.requested_s,
            granted_s=now,
        )

    def renew(self, request_id: str, attempt: int, now: float) -> None:
        for incoming in self.find(request_id, attempt):
            incoming.hold.deadline_s = now + self._lease_s

    def commit(self, incoming: Incoming) -> None:
        """Everything has arrived and was verified: the blocks become the request's."""
        request = incoming.sequence.request
        self._pool.acquire(incoming.block_ids, incoming.sequence.hold)
        self._pool.release(incoming.block_ids, incoming.hold)
        request.block_table += incoming.block_ids
        request.num_computed_tokens = request.num_tokens
        self._tables.complete(incoming.sequence)
        self._forget(incoming)

    def orphan(self, incoming: Incoming) -> None:
        """The request has ended and let go of its own blocks; the transfer's stay until it says so."""
        if incoming.state is IncomingState.GRANTED and incoming.block_ids:
            incoming.state = IncomingState.ORPHANED
        else:
            self._forget(incoming)

    def let_go(self, incoming: Incoming, *, writes_quiet: bool, now: float, verified: Iterable[int] = ()) -> None:
        """The transfer has ended without a commit. The request is orphaned before, or never had blocks.

        What was ``verified`` (indices in the prompt) becomes prefix cache: the next attempt finds it.
        """
        if incoming.state is not IncomingState.ORPHANED:
            return
        kept = sorted(index - incoming.first_index for index in verified)
        for position in kept:
            self._tables.name_block(incoming.sequence, incoming.first_index + position, incoming.block_ids[position])
        if writes_quiet:
            self._pool.release(incoming.block_ids, incoming.hold)
            self._forget(incoming)
        else:
            self._pool.release([incoming.block_ids[position] for position in kept], incoming.hold)
            for position in reversed(kept):
                del incoming.block_ids[position]
            self._pool.quarantine(incoming.block_ids, incoming.hold)
            incoming.hold.deadline_s = now + self._lease_s
            incoming.state = IncomingState.QUARANTINED

    def release_quarantine(self, incoming: Incoming) -> None:
        if incoming.state is IncomingState.QUARANTINED:
            self._pool.release_quarantine(incoming.block_ids)
            self._forget(incoming)

    def _forget(self, incoming: Incoming) -> None:
        request = incoming.sequence.request
        del self._handoffs[request.request_id, request.attempt]
