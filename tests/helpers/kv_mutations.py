"""Mistakes that a handoff protocol could have, each made in the production tables or machines: what the explorer must catch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton.kvtransfer import bitmap
from baton.kvtransfer import messages as m
from baton.kvtransfer.explorer.configuration import Configuration, Fault, Scenario
from baton.kvtransfer.explorer.invariants import Invariant
from baton.kvtransfer.explorer.moves import MachineTypes
from baton.kvtransfer.identity import HandoffId
from baton.kvtransfer.machine import Machine, Rule, go
from baton.kvtransfer.protocol import RECEIVER, SENDER, ReceiverState, SenderState
from baton.kvtransfer.receiver import Receiver
from baton.kvtransfer.sender import Sender

S, R = SenderState, ReceiverState
OVER = (m.GiveUp, m.PeerLost, m.LeaseExpired, m.HandoffOverdue, m.Abort)


@dataclass(frozen=True)
class Mutation:
    """A mistake, where it shows, and which invariant it breaks first."""

    name: str
    types: MachineTypes
    breaks: Invariant
    scenario: Scenario = Scenario.REQUESTS
    num_handoffs: int = 1
    num_blocks: int = 1
    faults: frozenset[Fault] = frozenset(Fault)
    max_faults: int = 1

    @property
    def configuration(self) -> Configuration:
        return Configuration(
            self.scenario, self.num_handoffs, self.num_blocks, self.num_blocks, self.max_faults, self.faults
        )


def edited(table: Mapping[Any, Any], changes: Mapping[tuple[Any, type[m.Event]], tuple[Rule[Any], ...]]) -> Any:
    """The table with other cells."""
    copied = {state: dict(row) for state, row in table.items()}
    for (state, event), rules in changes.items():
        copied[state][event] = rules
    return copied


def receiver(changes: Mapping[Any, Any], **methods: Any) -> MachineTypes:
    return MachineTypes(receiver=type("Mutant", (Receiver,), {"TABLE": edited(RECEIVER, changes), **methods}))


def sender(changes: Mapping[Any, Any], **methods: Any) -> MachineTypes:
    return MachineTypes(sender=type("Mutant", (Sender,), {"TABLE": edited(SENDER, changes), **methods}))


def only_index_and_block(self: Receiver, event: m.Push) -> bool:
    granted = {(slot.index, slot.block_id) for slot in self.slots.values()}
    return any((slot.index, slot.block_id) not in granted for slot in event.slots)


def as_many_as_granted(self: Any, event: Any) -> bool:
    """Counts what arrived, whatever it was, and takes the digest's place."""
    ended = self._landed.bit_count() + getattr(self, "_num_bad", 0)
    if isinstance(event, m.LandingEnded):
        ended += len(event.landed) + len(event.corrupt)
    return ended == self._granted.bit_count()


def count_bad_ones_too(self: Any, event: m.LandingEnded, now: float) -> None:
    Receiver._do_note_landed(self, event, now)
    self._num_bad = getattr(self, "_num_bad", 0) + len(event.corrupt)


def believe_the_announcement(self: Any, event: m.LandingEnded, now: float) -> None:
    blocks = (*event.landed, *((index, index + 1) for index in event.corrupt))
    Receiver._do_note_landed(self, m.LandingEnded(blocks, (), event.broken), now)


def let_everything_land(self: Any, event: m.Push, now: float) -> list[m.Command]:
    pushed = bitmap.of(slot.index for slot in event.slots)
    self._landing |= pushed
    return [m.LetLand(tuple(bitmap.indices(pushed)))]


def out_when_landed(self: Any, sent: int) -> bool:
    return self._granted & ~(sent | self._landed) == 0


def release_all_as_verified(self: Any, *, quiet: bool) -> list[m.Command]:
    (command,) = Receiver._release(self, quiet=quiet)
    assert isinstance(command, m.ReleaseSlots)
    return [m.ReleaseSlots(command.error, quiet, tuple(self.slots) if quiet else ())]


def unfenced(*parts: str) -> Any:
    """A ``receive`` that compares only some parts of a handoff's identity."""

    def seen(handoff: HandoffId) -> tuple[Any, ...]:
        every = {
            "request": handoff.key.request_id,
            "attempt": handoff.key.attempt,
            "workers": (handoff.sender.worker_id, handoff.receiver.worker_id),
            "processes": (handoff.sender.incarnation, handoff.receiver.incarnation),
        }
        return tuple(every[part] for part in parts)

    def receive(self: Any, event: m.Event, now: float) -> list[m.Command]:
        if isinstance(event, m.PeerMessage) and seen(event.handoff) == seen(self.handoff):
            self._check_fence(event)
            return self._step(event, now)  # type: ignore[no-any-return]
        return Machine.receive(self, event, now)

    return receive


def no_timers(original: Any) -> Any:
    def act(self: Any, event: Any, now: float) -> Any:
        commands = original(self, event, now)
        self._timers.clear()
        return commands

    return act


END = ("blame", "send_refuse", "release", "end")
MUTATIONS = (
    Mutation(
        "the generation of a slot is not checked",
        receiver({}, _is_outside_grant=only_index_and_block),
        Invariant.LATE_WRITE,
    ),
    Mutation(
        "slots are freed on a timeout while a write can land",
        receiver({(R.RECEIVING, event): (go(R.CLOSED, *END),) for event in OVER}),
        Invariant.LATE_WRITE,
    ),
    Mutation(
        "arrivals are counted, not marked",
        receiver(
            {},
            _is_whole=as_many_as_granted,
            _is_wrong_manifest=lambda self, event: False,
            _do_note_landed=count_bad_ones_too,
        ),
        Invariant.READABLE,
    ),
    Mutation(
        "a commit is accepted after the lease ran out",
        receiver({(R.CLOSED, m.Commit): (go(R.ADOPTING, "hold", "adopt"),)}),
        Invariant.OWNERSHIP,
    ),
    Mutation(
        "a commit is acknowledged before the blocks are verified",
        receiver({(R.RECEIVING, m.Commit): (go(R.COMMITTING, "send_ack", "hold", "be_patient"),)}),
        Invariant.AGREEMENT,
        max_faults=0,
    ),
    Mutation(
        "the sender's blocks are released before the transport is quiet",
        sender({(S.PUSHING, m.GiveUp): (go(S.FAILED, "blame", "send_abort", "stop", "end"),)}),
        Invariant.SENDER_REUSE,
    ),
    Mutation(
        "the attempt is not part of the fence",
        MachineTypes(
            type("Mutant", (Sender,), {"receive": unfenced("request", "workers", "processes")}),
            type("Mutant", (Receiver,), {"receive": unfenced("request", "workers", "processes")}),
        ),
        Invariant.FENCE,
        Scenario.ATTEMPTS,
        num_handoffs=2,
    ),
    Mutation(
        "the incarnation is not part of the fence",
        MachineTypes(
            type("Mutant", (Sender,), {"receive": unfenced("request", "attempt", "workers")}),
            type("Mutant", (Receiver,), {"receive": unfenced("request", "attempt", "workers")}),
        ),
        Invariant.FENCE,
        Scenario.REBORN,
        num_handoffs=2,
        faults=frozenset({Fault.CRASH}),
    ),
    Mutation(
        "a repeated commit takes the blocks over again",
        receiver({(R.ADOPTING, m.Commit): (go(R.ADOPTING, "hold", "adopt"),)}),
        Invariant.OWNERSHIP,
    ),
    Mutation(
        "quarantine ends with the first write instead of the last",
        receiver({(R.QUARANTINE, m.LandingEnded): (go(R.CLOSED, "note_ended", "release", "end"),)}),
        Invariant.LATE_WRITE,
        num_blocks=2,
    ),
    Mutation(
        "the digest is not compared",
        receiver({}, _is_wrong_manifest=lambda self, event: False),
        Invariant.READABLE,
    ),
    Mutation(
        "a repeated reservation gets other slots",
        receiver({(R.RECEIVING, m.Reserve): (go(R.RESERVING, "ask_host"),)}),
        Invariant.OWNERSHIP,
    ),
    Mutation(
        "Done is said when the quarantine begins and when it ends",
        receiver(
            {
                (R.RECEIVING, event): (
                    go(R.QUARANTINE, "blame", "stop_landing", "quarantine", "end", when="landing"),
                    go(R.CLOSED, *END),
                )
                for event in OVER
            }
        ),
        Invariant.ENDS_ONCE,
    ),
    Mutation(
        "a failed receiver does not say Done",
        receiver(
            {
                (R.RECEIVING, event): (
                    go(R.QUARANTINE, "blame", "send_refuse", "stop_landing", "quarantine", when="landing"),
                    go(R.CLOSED, "blame", "send_refuse", "release"),
                )
                for event in OVER
            }
        ),
        Invariant.NO_DEADLOCK,
        faults=frozenset({Fault.PARTITION}),
    ),
    Mutation(
        "nothing ever times out",
        MachineTypes(
            sender=type(
                "Mutant",
                (Sender,),
                {name: no_timers(getattr(Sender, name)) for name in ("_do_accept", "_do_send_commit", "_do_renew")},
            ),
        ),
        Invariant.NO_DEADLOCK,
        faults=frozenset({Fault.DROP}),
    ),
    Mutation(
        "the announced checksum is believed",
        receiver({}, _do_note_landed=believe_the_announcement),
        Invariant.READABLE,
        faults=frozenset({Fault.CORRUPT}),
    ),
    Mutation(
        "a repeated block is written again",
        receiver({}, _do_let_land=let_everything_land),
        Invariant.LATE_WRITE,
    ),
    Mutation(
        "slots are kept after a refusal",
        receiver({(R.RECEIVING, m.Abort): (go(R.CLOSED, "blame", "send_abort_ack", "end"),)}),
        Invariant.OWNERSHIP,
    ),
    Mutation(
        "all granted blocks are kept when a handoff fails",
        receiver({}, _release=release_all_as_verified),
        Invariant.READABLE,
    ),
    Mutation(
        "the receiver's word that a block landed stands for its checksum",
        sender({}, _is_out=out_when_landed),
        Invariant.NO_CONFUSION,
    ),
)
