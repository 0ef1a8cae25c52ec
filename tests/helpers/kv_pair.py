"""Both machines of a handoff joined by a bad network, with a pool, a transport and a clock that a seed decides about."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from helpers import kv_names as kv

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import RemoteProtocolError, TransferCode
from baton.kvtransfer.machine import Machine
from baton.kvtransfer.protocol import HandoffLimits
from baton.kvtransfer.receiver import Receiver
from baton.kvtransfer.sender import Sender

BLOCK_BYTES = 100


@dataclass
class Faults:
    """How likely each fault is at each step."""

    drop: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    link_loss: float = 0.0
    give_up: float = 0.0
    peer_loss: float = 0.0
    refuse: float = 0.0


@dataclass
class PairWorld:
    """Steps until nothing is left to do. What must never happen is asserted where it would."""

    seed: int
    num_blocks: int
    faults: Faults
    now: float = 0.0
    control: list[tuple[str, m.PeerMessage]] = field(default_factory=list)  # delivered in any order
    pushes: list[tuple[m.Slot, bytes]] = field(default_factory=list)  # one link: delivered in order
    reading: set[int] = field(default_factory=set)  # blocks of the sender that the transport reads
    open_landings: dict[int, int | None] = field(default_factory=dict)  # index -> content, None if corrupt
    memory: dict[int, int] = field(default_factory=dict)  # receiver's block id -> content
    owned: set[int] = field(default_factory=set)  # block ids of this handoff that nobody else may use
    released: list[bool] = field(default_factory=list)
    sender_done: list[m.Done] = field(default_factory=list)
    receiver_done: list[m.Done] = field(default_factory=list)
    adopted: int = 0
    stopping: bool = False
    asking: bool = False
    adopting: bool = False
    ready: int = 0
    finished: bool = False

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        limits = HandoffLimits(lease_s=15, reserve_timeout_s=20, ack_timeout_s=20, patience_s=2, max_handoff_s=100)
        options = {"block_bytes": BLOCK_BYTES, "limits": limits}
        self.sender = Sender(kv.HANDOFF, kv.names(self.num_blocks), self.num_blocks, **options)
        self.receiver = Receiver(kv.HANDOFF, token=kv.TOKEN, **options)
        self.feed(self.sender, m.Open("tcp"))

    # The shells.

    def feed(self, machine: Machine, event: m.Event) -> None:
        self.perform(machine, machine.handle_timer(self.now))
        try:
            commands = machine.receive(event, self.now)
        except RemoteProtocolError:
            commands = machine.receive(m.GiveUp("the peer broke the protocol", TransferCode.PROTOCOL), self.now)
        self.perform(machine, commands)

    def perform(self, machine: Machine, commands: list[m.Command]) -> None:
        for command in commands:
            match command:
                case m.Send(message):
                    self.control.append(("receiver" if machine is self.sender else "sender", message))
                case m.PushBlocks(slots, token):
                    self.reading |= {slot.index for slot in slots}
                    self.pushes += [(slot, token) for slot in slots]
                case m.StopPushing():
                    self.stopping = True
                case m.Done() if machine is self.sender:
                    assert not self.reading, "blocks are released while they are being read"
                    self.sender_done.append(command)
                case m.Done():
                    self.receiver_done.append(command)
                case m.ReserveSlots():
                    self.asking = True
                case m.LetLand(indices):
                    assert not self.open_landings.keys() & set(indices), "a block lands twice at once"
                    for index in indices:
                        corrupt = self.rng.random() < self.faults.corrupt
                        self.open_landings[index] = None if corrupt else kv.checksum(index)
                case m.Adopt():
                    assert not self.open_landings, "readable while a write can land"
                    self.adopting = True
                    self.adopted += 1
                case m.ReleaseSlots(_, quiet):
                    assert not quiet or not self.open_landings, "reusable while a write can land"
                    self.released.append(quiet)
                    if quiet:
                        self.owned.clear()

    # The world.

    def step(self) -> bool:
        """Does one thing out of those that can happen now. False: only time can help."""
        rng, faults = self.rng, self.faults
        if rng.random() < faults.give_up:
            self.feed(rng.choice([self.sender, self.receiver]), m.GiveUp("a client left"))
        if rng.random() < faults.peer_loss and self.receiver.state != "idle":
            self.feed(rng.choice([self.sender, self.receiver]), m.PeerLost("no route"))
        if rng.random() < faults.link_loss and self.sender.holds_lease:
            self.lose_link()
        choices = [self.deliver] * len(self.control)
        choices += [self.push] * bool(self.pushes)
        choices += [self.end_landing] * len(self.open_landings)
        choices += [self.quieten] * (self.stopping and not self.sender_done)
        choices += [self.answer_reserve] * self.asking
        choices += [self.adopt] * self.adopting
        choices += [self.compute] * (not self.finished and self.sender.state != "idle")
        choices += [self.renew] * (self.sender.holds_lease and rng.random() < 0.2)
        if not choices:
            return False
        rng.choice(choices)()
        return True

    def run(self) -> None:
        """Until both are over and no message is left; time passes only when nothing else can happen, or now and then."""
        for _ in range(20_000):
            if self.step():
                self.now += 0.1 * (self.rng.random() < 0.02)
            else:
                deadlines = [d for d in (self.sender.deadline, self.receiver.deadline) if d is not None]
                if not deadlines:
                    assert self.over(), f"seed {self.seed} is stuck: {self.sender.state}, {self.receiver.state}"
                    return
                self.now = max(self.now, min(deadlines))
            for machine in (self.sender, self.receiver):
                self.perform(machine, machine.handle_timer(self.now))
        raise AssertionError(f"seed {self.seed} never ends: {self.sender.state}, {self.receiver.state}")

    def over(self) -> bool:
        return self.sender.is_over and (self.receiver.is_over or self.receiver.state == "idle")

    def deliver(self) -> None:
        position = self.rng.randrange(len(self.control))
        to, message = self.control[position]
        if self.rng.random() >= self.faults.duplicate:
            del self.control[position]
        if self.rng.random() < self.faults.drop:
            return
        if to == "receiver" and self.receiver.state == "idle" and not isinstance(message, (m.Reserve, m.Abort)):
            return
        self.feed(self.receiver if to == "receiver" else self.sender, message)

    def push(self) -> None:
        slot, token = self.pushes.pop(0)
        self.reading.discard(slot.index)
        self.feed(self.sender, m.BlocksSent(((slot.index, kv.checksum(slot.index)),)))
        self.feed(self.receiver, m.Push(kv.HANDOFF, token, (slot,)))

    def end_landing(self) -> None:
        index = self.rng.choice(list(self.open_landings))
        content = self.open_landings.pop(index)
        slot = self.receiver.slots[index]
        assert slot.block_id in self.owned, "a write lands in a block that is somebody else's"
        self.memory[slot.block_id] = -1 if content is None else content
        if content is None:
            self.feed(self.receiver, m.LandingEnded(corrupt=(index,)))
        else:
            self.feed(self.receiver, m.LandingEnded(landed=((index, content),)))

    def lose_link(self) -> None:
        self.pushes.clear()
        self.reading.clear()
        broken = tuple(self.open_landings)
        self.open_landings.clear()
        if broken:
            self.feed(self.receiver, m.LandingEnded(broken=broken))
        self.feed(self.sender, m.LinkLost("reset"))

    def quieten(self) -> None:
        self.pushes.clear()
        self.reading.clear()
        self.stopping = False
        self.feed(self.sender, m.Quiet())

    def answer_reserve(self) -> None:
        self.asking = False
        if self.rng.random() < self.faults.refuse:
            self.feed(self.receiver, m.SlotsRefused(TransferCode.NO_CAPACITY, "full"))
            return
        lacking = [index for index in range(self.num_blocks) if self.rng.random() < 0.8]
        self.owned = {slot.block_id for slot in kv.slots(*lacking)}
        self.feed(self.receiver, m.SlotsReserved(kv.slots(*lacking)))

    def adopt(self) -> None:
        self.adopting = False
        self.feed(self.receiver, m.Adopted())

    def compute(self) -> None:
        if self.ready < self.num_blocks:
            self.feed(self.sender, m.BlocksReady((self.ready,)))
            self.ready += 1
        elif not self.sender.is_over:
            self.finished = True
            self.feed(self.sender, m.Finish(kv.FIRST_TOKEN))
        else:
            self.finished = True

    def renew(self) -> None:
        self.control.append(("receiver", m.Renew(kv.HANDOFF, self.now)))
