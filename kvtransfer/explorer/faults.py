"""What can go wrong with one handoff next. Every move here costs one fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import TransferCode
from baton.kvtransfer.explorer.configuration import Configuration, Fault
from baton.kvtransfer.explorer.lane import ABSENT, BENT_TOKEN, CANCEL, FORGET, GONE, Draft, Frame, Lane
from baton.kvtransfer.explorer.moves import WITH_LEASE, Move, Moves, effective, pop, refuse_slots


class Faults:
    """The faults of one handoff, whose other moves are ``moves``."""

    def __init__(self, configuration: Configuration, moves: Moves) -> None:
        self._kinds = configuration.faults
        self._num_blocks = max(2, configuration.pool_blocks)
        self._moves = moves
        self._machines = moves.machines

    def of(self, lane: Lane) -> list[Move]:
        """Those that are allowed."""
        if lane.sender == ABSENT:
            return []
        return effective(lane, (move for kind, move in self._all(lane) if kind in self._kinds))

    def _all(self, lane: Lane) -> Iterator[tuple[Fault, Move]]:
        yield from self._messages(lane)
        if lane.link:
            yield from self._frames(lane)
        for timer in self._moves.timers(lane):
            yield Fault.TIMEOUT, timer._replace(label=("early:", *timer.label))
        for landing in lane.landings:
            yield from ((Fault.CORRUPT, move) for move in self._moves.land_corrupt(lane, landing))
        if lane.is_asking and not lane.is_withdrawn:
            yield Fault.REFUSAL, self._moves.move(lane, ("host refuses",), refuse_slots)
        if lane.is_adopting:
            yield Fault.REFUSAL, self._moves.move(lane, ("host cannot take the blocks over",), _fail_adopting)
        if lane.sender >= 0 and not lane.sender_end:
            yield from self._sender(lane)
        if lane.receiver >= 0 and not lane.receiver_end:
            yield Fault.PARTITION, self._moves.move(lane, ("D takes P for lost",), _lose_sender)

    def _messages(self, lane: Lane) -> Iterator[tuple[Fault, Move]]:
        for word in dict.fromkeys(lane.control):
            if word in (CANCEL, FORGET):
                continue  # the gateway's streams lose and repeat nothing
            message = self._machines.words[word]
            label = f"{type(message).__name__} is lost"
            yield Fault.DROP, self._moves.move(lane, (label,), partial(_lose, word))
            yield Fault.DUPLICATE, self._moves.deliver(lane, word, keep=True)
            if isinstance(message, m.Commit) and message.first_token != BENT_TOKEN:
                bent = dataclasses.replace(message, digest=bytes(16), first_token=BENT_TOKEN)
                yield Fault.BENT, self._moves.deliver(lane, word, instead=self._machines.word(bent))

    def _frames(self, lane: Lane) -> Iterator[tuple[Fault, Move]]:
        frame = lane.link[0]
        yield Fault.STRAY, self._moves.deliver_frame(lane, frame, _keep_stray, "frame arrives, and again later")
        token, (*others, (index, block_id, generation)) = frame
        older = Frame(token, (*others, (index, block_id, generation - 1)))
        other = Frame(token, (*others, (index, (block_id + 1) % self._num_blocks, generation)))
        for bent, label in ((older, "frame of an older generation arrives"), (other, "frame for another slot arrives")):
            yield Fault.BENT, self._moves.deliver_frame(lane, bent, lambda c: pop(c, "link"), label)

    def _sender(self, lane: Lane) -> Iterator[tuple[Fault, Move]]:
        yield Fault.CANCEL, self._moves.move(lane, ("client leaves",), _cancel)
        yield Fault.PARTITION, self._moves.move(lane, ("P takes D for lost",), _lose_receiver)
        if lane.outbox and not lane.is_stopping:
            yield Fault.SLOW, self._moves.move(lane, ("P sends a frame and is slow to say so",), _send_silently)

    # What happens to all handoffs at once.

    def lose_link(self, lane: Lane, *, late: bool) -> Move:
        """The connection breaks; what is on it is lost, or the next frame comes ``late``."""
        label = "data connection breaks, what is on it comes late" if late else "data connection breaks"
        return self._moves.move(lane, (label,), lambda c: self._break(c, late=late))

    def kill_sender(self, lane: Lane) -> Move:
        """The sender's process dies."""

        def die(change: Draft) -> None:
            if change.sender >= 0:
                change.sender = GONE
                change.outbox = change.unreported = ()
                change.verdicts = ABSENT
                change.is_stopping = False
                change.cut_landings()
                if not lane.is_receiver_over:
                    change.say(FORGET)

        return self._moves.move(lane, ("P dies",), die)

    def kill_receiver(self, lane: Lane) -> Move:
        """The receiver's process dies, and its memory with it."""

        def die(change: Draft) -> None:
            if lane.sender == ABSENT:
                return
            change.receiver = GONE
            change.link = change.strays = change.landings = ()
            change.verdicts = ABSENT
            change.is_asking = change.is_withdrawn = change.is_adopting = False
            if not lane.is_sender_over:
                self._break(change, late=False)
                change.say(CANCEL)

        return self._moves.move(lane, ("D dies",), die)

    def replace_sender(self, lane: Lane) -> Move:
        """The sender's successor shakes hands: what its predecessor began is stale."""

        def retire(change: Draft) -> None:
            if change.sender == GONE and change.receiver >= 0 and not change.receiver_end:
                change.tell_receiver(m.PeerLost("replaced", TransferCode.STALE))

        return self._moves.move(lane, ("D meets P's successor",), retire)

    def _break(self, change: Draft, *, late: bool) -> None:
        if late:
            change.strays = tuple(sorted({*change.strays, *change.link[:1]}))
        change.link = change.outbox = change.unreported = ()
        change.verdicts = ABSENT
        change.cut_landings()
        if change.is_stopping:
            change.is_stopping = False
            change.tell_sender(m.Quiet())
        elif change.sender >= 0 and self._machines[change.sender].state in WITH_LEASE:
            change.tell_sender(m.LinkLost("reset"))


def _lose(word: int, change: Draft) -> None:
    change.unsay(word)


def _keep_stray(change: Draft) -> None:
    change.strays = tuple(sorted({*change.strays, pop(change, "link")}))


def _send_silently(change: Draft) -> None:
    frame = pop(change, "outbox")
    change.link += (frame,)
    change.unreported += (frame,)


def _cancel(change: Draft) -> None:
    change.say(CANCEL)
    if change.receiver != GONE and not change.receiver_end:
        change.say(FORGET)


def _lose_sender(change: Draft) -> None:
    change.tell_receiver(m.PeerLost("unreachable"))


def _lose_receiver(change: Draft) -> None:
    change.tell_sender(m.PeerLost("unreachable"))


def _fail_adopting(change: Draft) -> None:
    change.is_adopting = False
    change.tell_receiver(m.AdoptFailed(TransferCode.INTERNAL, ""))
