"""One handoff as the explorer sees it: both machines, and all that lies between and around them.

The shells of the two workers are here in their smallest form: what ``sending.py`` and ``incoming.py`` do with each command. The
pool is shared by the handoffs, so what happens to it leaves here as effects.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

from baton.kvtransfer import messages as m
from baton.kvtransfer.explorer.invariants import Invariant, Violation
from baton.kvtransfer.explorer.machines import Machines
from baton.kvtransfer.explorer.pool import TORN
from baton.kvtransfer.protocol import ReceiverState

ABSENT = -1
GONE = -2  # it was in a process that died

# What the gateway says to the workers, beside the numbers of what they say to each other.
CANCEL = -1  # to the sender: it is over, or no longer wanted
FORGET = -2  # to the receiver: likewise

BENT_TOKEN = m.FirstToken(-1)
"""In a commit that was altered on its way."""


class Frame(NamedTuple):
    """Blocks on the data plane, or waiting for it. ``slots`` are (index, block, generation)."""

    token: bytes
    slots: tuple[tuple[int, int, int], ...]


class Landing(NamedTuple):
    """Writes of one frame that have begun and not ended, as (index, block, generation)."""

    slots: tuple[tuple[int, int, int], ...]
    is_cut: bool  # the connection broke, or they were told to stop: they may end before their time


class Effect(NamedTuple):
    """What happens to the pool: a function of ``pool.py`` and what it takes."""

    name: str
    arguments: tuple[Any, ...] = ()


class Lane(NamedTuple):
    """Immutable, so that it can be compared and counted. Machines and messages are numbers of ``Machines``."""

    sender: int = ABSENT
    receiver: int = ABSENT
    num_computed: int = 0  # chunks of the prompt; one more: the first token is there
    outbox: tuple[Frame, ...] = ()  # the transport reads the sender's blocks for these
    unreported: tuple[Frame, ...] = ()  # sent, and the sender's machine has not heard it
    link: tuple[Frame, ...] = ()  # in order
    strays: tuple[Frame, ...] = ()  # in no order
    verdicts: int = ABSENT  # on their way back
    control: tuple[int, ...] = ()  # in no order
    landings: tuple[Landing, ...] = ()
    is_forgotten: bool = False  # before there was a receiver
    is_asking: bool = False  # the host looks for room
    is_withdrawn: bool = False  # and was told to stop
    is_stopping: bool = False  # the transport was told to read no more
    is_adopting: bool = False
    is_adopted: bool = False
    is_finished: bool = False  # the request that had the blocks is over
    sender_end: str = ""  # "done", "failed"
    receiver_end: str = ""

    @property
    def is_sender_over(self) -> bool:
        return self.sender == GONE or self.sender_end != ""

    @property
    def is_receiver_over(self) -> bool:
        return self.receiver == GONE or self.receiver_end != ""

    @property
    def is_concluding(self) -> bool:
        """All that is left is that the sender hears of the end: that touches neither the pool nor another handoff."""
        return self.sender >= 0 and not self.sender_end and (self.receiver == GONE or self.receiver_end == "failed")


_fields = attrgetter(*Lane._fields)


class Draft:
    """A lane being changed: it has a lane's attributes. ``effects`` are for the pool, in order."""

    sender: int
    receiver: int
    num_computed: int
    outbox: tuple[Frame, ...]
    unreported: tuple[Frame, ...]
    link: tuple[Frame, ...]
    strays: tuple[Frame, ...]
    verdicts: int
    control: tuple[int, ...]
    landings: tuple[Landing, ...]
    is_forgotten: bool
    is_asking: bool
    is_withdrawn: bool
    is_stopping: bool
    is_adopting: bool
    is_adopted: bool
    is_finished: bool
    sender_end: str
    receiver_end: str

    def __init__(self, lane: Lane, machines: Machines, names: tuple[bytes, ...]) -> None:
        for name, value in zip(Lane._fields, lane, strict=True):
            setattr(self, name, value)
        self.machines = machines
        self.names = names
        self.effects: list[Effect] = []
        self.frame: Frame | None = None  # the one being delivered

    def freeze(self) -> Lane:
        return Lane._make(_fields(self))

    # The sender's shell.

    def tell_sender(self, event: m.Event | type[m.Timeout]) -> None:
        self.sender, commands = self.machines.step(self.sender, event)
        self._perform_for_sender(commands)

    def hear_at_sender(self, word: int) -> None:
        self.sender, commands = self.machines.hear(self.sender, word)
        self._perform_for_sender(commands)

    def _perform_for_sender(self, commands: tuple[m.Command, ...]) -> None:
        for command in commands:
            match command:
                case m.Send(message):
                    self.say(self.machines.word(message))
                case m.PushBlocks(slots, token):
                    self.outbox += (Frame(token, tuple((s.index, s.block_id, s.generation) for s in slots)),)
                case m.StopPushing():
                    self.unreported = ()
                    self.outbox = self.outbox[:1]  # what is being read now goes on for a while
                    self.is_stopping = True
                case m.Done(error):
                    self._end_sender(error is not None)
                case _:
                    raise Violation(Invariant.NO_CONFUSION, f"a sender commands {command}")
        if self.is_stopping and not self.outbox:
            self.is_stopping = False
            self.tell_sender(m.Quiet())

    def _end_sender(self, has_failed: bool) -> None:
        if self.sender_end:
            raise Violation(Invariant.ENDS_ONCE, "the sender says Done again")
        if self.outbox:
            raise Violation(Invariant.SENDER_REUSE, "the sender releases blocks that its transport reads")
        if not has_failed and not self.is_adopted and self.receiver != GONE:
            raise Violation(Invariant.AGREEMENT, "the sender heard that blocks were taken over, and they were not")
        self.is_stopping = False
        self.sender_end = "failed" if has_failed else "done"
        if has_failed and not self.receiver_end and self.receiver != GONE:
            self.say(FORGET)

    # The receiver's shell.

    def tell_receiver(self, event: m.Event | type[m.Timeout]) -> None:
        before = self.machines[self.receiver]
        self.receiver, commands = self.machines.step(self.receiver, event)
        self._perform_for_receiver(commands, before)

    def hear_at_receiver(self, word: int) -> None:
        before = self.machines[self.receiver]
        self.receiver, commands = self.machines.hear(self.receiver, word)
        self._perform_for_receiver(commands, before)

    def _perform_for_receiver(self, commands: tuple[m.Command, ...], before: Any) -> None:
        for command in commands:
            match command:
                case m.Send(m.Verdicts() as message):
                    self._report(message)
                case m.Send(message):
                    self.say(self.machines.word(message))
                case m.ReserveSlots():
                    self.is_asking = True
                case m.StopReserving():
                    self.is_withdrawn = True
                case m.LetLand(indices):
                    self._begin_landings(indices)
                case m.Discard():
                    pass
                case m.StopLanding():
                    self.cut_landings()
                case m.Adopt(first_token):
                    if first_token == BENT_TOKEN:
                        raise Violation(Invariant.READABLE, "blocks are taken over although the digest is another's")
                    if self.is_adopting or self.is_adopted:
                        raise Violation(Invariant.OWNERSHIP, "blocks are taken over twice")
                    self.is_adopting = True
                case m.ReleaseSlots(_, is_quiet, verified):
                    slots = getattr(before, "slots", {})  # those of now may be stripped already
                    self._release(is_quiet, tuple(slots[index] for index in verified))
                case m.Done(error):
                    self._end_receiver(error is not None)
                case _:
                    raise Violation(Invariant.NO_CONFUSION, f"a receiver commands {command}")

    def _report(self, verdicts: m.Verdicts) -> None:
        """Verdicts that wait for the sender come to it together. Apart they come when each is heard before the next is made."""
        if self.verdicts != ABSENT:
            waiting = self.machines.words[self.verdicts]
            assert isinstance(waiting, m.Verdicts)
            landed = tuple(sorted({*waiting.landed, *verdicts.landed}))
            verdicts = m.Verdicts(verdicts.handoff, landed, tuple(sorted({*waiting.corrupt, *verdicts.corrupt})))
        self.verdicts = self.machines.word(verdicts)

    def _begin_landings(self, indices: tuple[int, ...]) -> None:
        assert self.frame is not None
        slots = {slot[0]: slot for slot in self.frame.slots}
        for index in indices:
            if any(slot[0] == index for landing in self.landings for slot in landing.slots):
                raise Violation(Invariant.LATE_WRITE, f"two writes of block {index} at once")
            _, block_id, generation = slots[index]
            self.effects.append(Effect("write", (block_id, generation, TORN)))
        begun = Landing(tuple(slots[index] for index in indices), False)
        self.landings = tuple(sorted((*self.landings, begun)))

    def cut_landings(self) -> None:
        """They may end before their time from now on."""
        self.landings = tuple(sorted(landing._replace(is_cut=True) for landing in self.landings))

    def _release(self, is_quiet: bool, kept: tuple[m.Slot, ...]) -> None:
        if is_quiet and self.landings:
            raise Violation(Invariant.LATE_WRITE, f"slots are reusable while a write can land: {self.landings}")
        self.effects.append(Effect("release" if is_quiet else "quarantine", (kept, self.names)))

    def _end_receiver(self, has_failed: bool) -> None:
        if self.receiver_end:
            raise Violation(Invariant.ENDS_ONCE, "the receiver says Done again")
        self.receiver_end = "failed" if has_failed else "done"
        if has_failed and not self.sender_end and self.sender >= 0:
            self.say(CANCEL)

    # Between them.

    def say(self, word: int) -> None:
        self.control = tuple(sorted((*self.control, word)))

    def unsay(self, word: int) -> None:
        at = self.control.index(word)
        self.control = self.control[:at] + self.control[at + 1 :]


_HOLDING = frozenset({ReceiverState.RECEIVING, ReceiverState.COMMITTING, ReceiverState.ADOPTING})


def check_holds(lane: Lane, machines: Machines, held: frozenset[tuple[int, int]]) -> None:
    """Raises Violation unless the machine, the open writes and the pool (``held``) agree on who has what."""
    if any(slot[1:] not in held for landing in lane.landings for slot in landing.slots):
        raise Violation(Invariant.LATE_WRITE, f"a write is open to a block that was given up: {lane.landings}")
    believed: frozenset[tuple[int, int]] = frozenset()
    state = None
    if lane.receiver >= 0:
        machine: Any = machines[lane.receiver]
        state = machine.state
        slots = getattr(machine, "slots", {})
        believed = frozenset((slot.block_id, slot.generation) for slot in slots.values())
    if state in _HOLDING:
        agrees = held == believed
    elif state is ReceiverState.QUARANTINE:
        agrees = held <= believed
    else:
        agrees = not held
    if not agrees:
        raise Violation(
            Invariant.OWNERSHIP,
            f"in state {state} the receiver is to hold {sorted(believed)}; the pool says {sorted(held)}",
        )
