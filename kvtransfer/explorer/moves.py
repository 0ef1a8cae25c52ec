"""What can happen to one handoff next by itself.

A move names the lane that it leads to and what it does to the pool. Where nothing else can happen, timers fire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import TransferCode
from baton.kvtransfer.explorer.configuration import Configuration
from baton.kvtransfer.explorer.invariants import Violation
from baton.kvtransfer.explorer.lane import ABSENT, CANCEL, FORGET, GONE, Draft, Effect, Frame, Landing, Lane
from baton.kvtransfer.explorer.machines import Machines
from baton.kvtransfer.explorer.pool import TORN
from baton.kvtransfer.identity import HandoffId
from baton.kvtransfer.protocol import SenderState
from baton.kvtransfer.receiver import Receiver
from baton.kvtransfer.sender import Sender

TO_SENDER = (m.Grant, m.Refuse, m.Ack, m.Incomplete, m.AbortAck, m.Renewed)
WITH_LEASE = (SenderState.PUSHING, SenderState.FLUSHING, SenderState.COMMITTING)
_DECIDED = (SenderState.SETTLING, SenderState.ACKED, SenderState.FAILED)
_BLOCK_BYTES = 1
_Slots = tuple[tuple[int, int, int], ...]


class MachineTypes(NamedTuple):
    """What is explored; tests put broken ones here."""

    sender: type[Sender] = Sender
    receiver: type[Receiver] = Receiver


class Move(NamedTuple):
    """``violation``: it breaks something, and leads nowhere."""

    label: tuple[Any, ...]
    lane: Lane
    effects: tuple[Effect, ...]
    violation: Violation | None = None


class Moves:
    """The moves of handoff ``number``."""

    def __init__(
        self, configuration: Configuration, number: int, machines: Machines, machine_types: MachineTypes
    ) -> None:
        self.names = configuration.block_names(number)
        self.machines = machines
        self.late_words: set[int] = set()  # messages that came when nobody would act on them
        self._types = machine_types
        self._token = bytes([number]) * 32
        rest = tuple(range(1, configuration.num_blocks))
        self._chunks = ((0,), rest) if rest else ((0,),)
        self._waits_with_prefill = number > 0  # the prompts behind the first are computed after it

    def open(self, handoff: HandoffId) -> Lane:
        """The gateway opens the handoff on both sides."""
        sender = self._types.sender(handoff, self.names, len(self.names), block_bytes=_BLOCK_BYTES)
        change = Draft(Lane(), self.machines, self.names)
        change.sender = self.machines.add(sender)
        change.tell_sender(m.Open("tcp"))
        return change.freeze()

    def free(self, lane: Lane) -> list[Move]:
        """Timers only where nothing else is left."""
        moves = effective(lane, self._free(lane))
        return moves if moves or lane.is_asking else effective(lane, self.timers(lane))

    def _free(self, lane: Lane) -> Iterator[Move]:
        if lane.sender >= 0:
            yield from self._sender_moves(lane)
        if lane.link:
            yield self.deliver_frame(lane, lane.link[0], lambda c: pop(c, "link"), "frame arrives")
            if lane.sender == GONE:
                yield self.move(lane, ("the data connection ends",), lambda c: setattr(c, "link", ()))
        for frame in lane.strays:
            yield self.deliver_frame(lane, frame, partial(_take_stray, frame), "old frame arrives")
        if lane.verdicts != ABSENT:
            yield self.move(lane, ("verdicts arrive",), self._hear_verdicts)
        for word in dict.fromkeys(lane.control):
            yield self.deliver(lane, word)
        for landing in lane.landings:
            yield from self._end_landing(lane, landing)
        if lane.is_withdrawn:
            yield self.move(lane, ("host stops looking for room",), refuse_slots)
        if lane.is_adopting:
            yield self.move(lane, ("host takes the blocks over",), self._adopt)
        if lane.is_adopted and not lane.is_finished and lane.receiver != GONE:
            yield self.move(lane, ("request ends",), _finish)

    def _sender_moves(self, lane: Lane) -> Iterator[Move]:
        state = self.machines[lane.sender].state
        # Whatever is sent to a receiver that failed is refused, as ``_is_vain`` sees; so nothing is lost by not sending it.
        is_vain = lane.receiver == GONE or lane.receiver_end == "failed"
        may_compute = state in WITH_LEASE if self._waits_with_prefill else state not in _DECIDED
        if lane.num_computed <= len(self._chunks) and may_compute and not is_vain:
            yield self.move(lane, ("prefill goes on",), self._compute)
        if lane.outbox and (lane.is_stopping or not is_vain):
            yield self.move(lane, ("P sends a frame",), _send)
        if lane.unreported:
            yield self.move(lane, ("P reports what it sent",), lambda c: c.tell_sender(_sent(pop(c, "unreported"))))
        if lane.is_stopping:
            yield self.move(lane, ("P's transport is quiet",), _quiet)
        if lane.receiver == GONE and not lane.sender_end:
            yield self.move(lane, ("P cannot reach D",), lambda c: c.tell_sender(m.PeerLost("unreachable")))
        if lane.receiver >= 0 and state in WITH_LEASE:
            yield self.move(lane, ("heartbeat",), _beat)

    def timers(self, lane: Lane) -> Iterator[Move]:
        """Everything that could run out."""
        for who, number, tell in (("P", lane.sender, Draft.tell_sender), ("D", lane.receiver, Draft.tell_receiver)):
            for timer in self.machines.armed(number) if number >= 0 else ():
                yield self.move(lane, (f"{who}: {timer.__name__}",), partial(_fire, tell, timer))

    def grant(self, lane: Lane, slots: tuple[m.Slot, ...]) -> Move:
        """The host found room."""

        def take(change: Draft) -> None:
            change.is_asking = change.is_withdrawn = False
            change.tell_receiver(m.SlotsReserved(slots))

        return self.move(lane, ("host makes room",), take)

    # How moves are made.

    def move(self, lane: Lane, label: tuple[Any, ...], act: Callable[[Draft], Any]) -> Move:
        """What ``act`` makes of a lane."""
        change = Draft(lane, self.machines, self.names)
        try:
            act(change)
        except Violation as violation:
            return Move(label, lane, tuple(change.effects), violation)
        return Move(label, self._without_the_past(change.freeze()), tuple(change.effects))

    def deliver(self, lane: Lane, word: int, *, keep: bool = False, instead: int | None = None) -> Move:
        """A message arrives; it may stay to arrive again, or another arrive in its place."""
        heard = word if instead is None else instead
        name = {CANCEL: "Cancel", FORGET: "Forget"}.get(heard) or type(self.machines.words[heard]).__name__

        def take(change: Draft) -> None:
            if not keep:
                change.unsay(word)
            self._hear(change, heard)

        suffix = " and stays" if keep else " altered" if instead is not None else ""
        return self.move(lane, (f"{name} arrives{suffix}",), take)

    def deliver_frame(self, lane: Lane, frame: Frame, take_off: Callable[[Draft], Any], label: str) -> Move:
        """A frame arrives, and is taken off whatever it was on."""
        handoff = (
            self.machines[lane.receiver if lane.receiver >= 0 else lane.sender].handoff if _is_alive(lane) else None
        )

        def take(change: Draft) -> None:
            take_off(change)
            change.frame = frame
            if change.receiver >= 0 and handoff is not None:
                word = self.machines.word(m.Push(handoff, frame.token, tuple(m.Slot(*slot) for slot in frame.slots)))
                change.hear_at_receiver(word)

        return self.move(lane, (f"{label}: blocks", *(slot[0] for slot in frame.slots)), take)

    def _hear(self, change: Draft, word: int) -> None:
        if word == FORGET:
            if change.receiver == ABSENT:
                change.is_forgotten = True
            elif change.receiver >= 0 and not change.receiver_end:
                change.tell_receiver(m.GiveUp("forgotten"))
        elif word == CANCEL:
            if change.sender >= 0 and not change.sender_end:
                change.tell_sender(m.GiveUp("cancelled"))
        elif isinstance(self.machines.words[word], TO_SENDER):
            if change.sender >= 0:
                change.hear_at_sender(word)
        else:
            self._hear_at_receiver(change, word)

    def _hear_at_receiver(self, change: Draft, word: int) -> None:
        message = self.machines.words[word]
        if change.receiver == ABSENT:
            if isinstance(message, m.Commit | m.Renew) or (isinstance(message, m.Reserve) and change.is_forgotten):
                change.say(self.machines.word(m.Refuse(message.handoff, TransferCode.ABORTED, "")))
                return
            receiver = self._types.receiver(message.handoff, token=self._token, block_bytes=_BLOCK_BYTES)
            change.receiver = self.machines.add(receiver)
        if change.receiver >= 0:
            change.hear_at_receiver(word)

    def _hear_verdicts(self, change: Draft) -> None:
        word, change.verdicts = change.verdicts, ABSENT
        if change.sender >= 0:
            change.hear_at_sender(word)

    def _compute(self, change: Draft) -> None:
        if change.num_computed < len(self._chunks):
            change.tell_sender(m.BlocksReady(self._chunks[change.num_computed]))
        else:
            change.tell_sender(m.Finish(m.FirstToken(1)))
        change.num_computed += 1

    def _adopt(self, change: Draft) -> None:
        receiver: Any = self.machines[change.receiver]
        change.effects.append(Effect("adopt", (tuple(receiver.slots.values()), self.names)))
        change.is_adopting = False
        change.is_adopted = True
        change.tell_receiver(m.Adopted())

    def _end_landing(self, lane: Lane, landing: Landing) -> Iterator[Move]:
        first, *others = landing.slots
        yield self._landed(lane, landing, (), ())
        if landing.is_cut:
            yield self._landed(lane, landing, (), landing.slots)
            if others:
                yield self._landed(lane, landing, (), tuple(others))
        if lane.is_sender_over:
            # With shared memory the sender may have reused the block that is being copied.
            yield self._landed(lane, landing, (first,), ())

    def land_corrupt(self, lane: Lane, landing: Landing) -> Iterator[Move]:
        """One block arrives with other bytes than were announced."""
        for slot in landing.slots:
            yield self._landed(lane, landing, (slot,), ())

    def _landed(self, lane: Lane, landing: Landing, corrupt: _Slots, broken: _Slots) -> Move:
        """The writes of a frame end; those not named in a bad way are whole."""
        whole = tuple(slot for slot in landing.slots if slot not in corrupt and slot not in broken)
        event = m.LandingEnded(
            tuple((slot[0], _checksum(slot[0])) for slot in whole), _indices(corrupt), _indices(broken)
        )

        def end(change: Draft) -> None:
            change.landings = tuple(other for other in change.landings if other != landing)
            for slot in landing.slots:
                content = self.names[slot[0]] if slot in whole else TORN
                change.effects.append(Effect("write", (slot[1], slot[2], content)))
            change.tell_receiver(event)

        parts = (("landed", whole), ("corrupt", corrupt), ("cut short", broken))
        label = ", ".join(f"{what} {' '.join(map(str, _indices(slots)))}" for what, slots in parts if slots)
        return self.move(lane, (f"blocks {label}",), end)

    # What can make no difference any more.

    def _without_the_past(self, lane: Lane) -> Lane:
        """Drops it, so that lanes that differ only in that are one.

        Whether a message to a machine that is over makes no difference is not taken for granted: the machine is asked.
        """
        sender_over, receiver_over = lane.is_sender_over, lane.is_receiver_over
        changes: dict[str, Any] = {}
        if sender_over and lane.num_computed:
            changes["num_computed"] = 0
        if lane.is_forgotten and lane.receiver != ABSENT:
            changes["is_forgotten"] = False
        if not (sender_over or receiver_over):
            return lane._replace(**changes) if changes else lane
        if lane.verdicts != ABSENT and sender_over and self._is_vain(lane.sender, lane.verdicts, receiver_over):
            changes["verdicts"] = ABSENT
        changes["control"] = tuple(word for word in lane.control if not self._is_past(lane, word))
        if receiver_over and (lane.link or lane.strays):
            if lane.receiver == GONE or not _is_alive(lane):
                changes["link"] = changes["strays"] = ()
            else:
                handoff = self.machines[lane.receiver].handoff
                pushes = [
                    self.machines.word(m.Push(handoff, token, tuple(m.Slot(*slot) for slot in slots)))
                    for token, slots in (*lane.link, *lane.strays)
                ]
                if all(self._is_vain(lane.receiver, push, sender_over) for push in pushes):
                    changes["link"] = changes["strays"] = ()
        return lane._replace(**changes)

    def _is_past(self, lane: Lane, word: int) -> bool:
        if word == FORGET:
            return lane.is_receiver_over
        if word == CANCEL:
            return lane.is_sender_over
        if isinstance(self.machines.words[word], TO_SENDER):
            return lane.is_sender_over and self._is_vain(lane.sender, word, lane.is_receiver_over)
        return lane.is_receiver_over and self._is_vain(lane.receiver, word, lane.is_sender_over)

    def _is_vain(self, machine: int, word: int, is_other_over: bool) -> bool:
        """The machine takes the message without a change, and nobody will act on its answer."""
        if machine >= 0:
            try:
                outcome = self.machines.hear(machine, word)
            except Violation:
                return False  # to be found where it is delivered
            answers = [command for command in outcome.commands if not isinstance(command, m.Discard)]
            is_answered = bool(answers) and not is_other_over
            if outcome.machine != machine or is_answered or not all(isinstance(a, m.Send) for a in answers):
                return False
        self.late_words.add(word)
        return True


def effective(lane: Lane, moves: Iterator[Move]) -> list[Move]:
    """Those that change something."""
    return [move for move in moves if move.lane != lane or move.effects or move.violation]


def pop(change: Draft, queue: str) -> Any:
    """Takes the first out of a queue of the lane."""
    head, *rest = getattr(change, queue)
    setattr(change, queue, tuple(rest))
    return head


def refuse_slots(change: Draft) -> None:
    """The host makes no room."""
    change.is_asking = change.is_withdrawn = False
    change.tell_receiver(m.SlotsRefused(TransferCode.NO_CAPACITY, ""))


def _send(change: Draft) -> None:
    frame = pop(change, "outbox")
    change.link += (frame,)
    if change.is_stopping:
        _quiet(change)
    elif change.unreported:
        change.unreported += (frame,)  # reports are in order
    else:
        change.tell_sender(_sent(frame))


def _quiet(change: Draft) -> None:
    change.outbox = ()
    change.is_stopping = False
    change.tell_sender(m.Quiet())


def _beat(change: Draft) -> None:
    """A question and its answer, with nothing in between."""
    before = change.control
    change.control = ()
    change.tell_receiver(m.Renew(change.machines[change.sender].handoff, 0.0))
    answers: tuple[int, ...] = change.control
    change.control = before
    for word in answers:
        change.hear_at_sender(word)


def _fire(tell: Callable[[Draft, type[m.Timeout]], None], timer: type[m.Timeout], change: Draft) -> None:
    tell(change, timer)


def _finish(change: Draft) -> None:
    change.is_finished = True
    change.effects.append(Effect("finish"))


def _take_stray(frame: Frame, change: Draft) -> None:
    change.strays = tuple(stray for stray in change.strays if stray != frame)


def _is_alive(lane: Lane) -> bool:
    return lane.sender >= 0 or lane.receiver >= 0


def _indices(slots: _Slots) -> tuple[int, ...]:
    return tuple(slot[0] for slot in slots)


def _checksum(index: int) -> int:
    return index + 1


def _sent(frame: Frame) -> m.BlocksSent:
    return m.BlocksSent(tuple((slot[0], _checksum(slot[0])) for slot in frame.slots))
