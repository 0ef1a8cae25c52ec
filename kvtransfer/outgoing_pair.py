"""One receiver that a worker hands blocks to: a control channel, a link by the best transport that works, a heartbeat."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import structlog

from baton.kvtransfer import failpoint
from baton.kvtransfer import messages as m
from baton.kvtransfer.canary import CanaryFailed, CanarySender, LinkReport
from baton.kvtransfer.context import AgentContext
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.handshake import PeerClient
from baton.kvtransfer.identity import HandoffId, WorkerIdentity, pair_digest
from baton.kvtransfer.linking import Link, Linker
from baton.kvtransfer.silence import VerdictWatch
from baton.kvtransfer.transport.base import Transport
from baton.kvtransfer.transport.outlet import Pushes

_log = structlog.get_logger(__name__)

_LOOKS = 8  # how often, in the time that a link may be silent, it is looked at


class PairedHandoff(Protocol):
    """A handoff as its pair sees it."""

    id: HandoffId

    @property
    def holds_lease(self) -> bool:
        """The receiver has granted, and waits to hear that the handoff is alive."""
        ...

    def feed(self, event: m.Event) -> None: ...

    def fell_back(self, failed: Sequence[str]) -> None:
        """Its blocks go by another transport from now on; these have failed."""
        ...


class OutgoingPair:
    """One receiver process. Passes on what is heard of its handoffs, and renews their leases.

    Blocks go by one transport. When that spoils one and there is another, the pair shakes hands again for it, and its handoffs
    go on there with what has not landed. While it does, what they push is dropped: they push again when the link is new.
    """

    def __init__(
        self,
        context: AgentContext,
        receiver: WorkerIdentity,
        client: PeerClient,
        linker: Linker,
        discard: Callable[[OutgoingPair], None],
    ) -> None:
        self.receiver = receiver
        self.client = client
        self.is_closed = False
        self._context = context
        self._linker = linker
        self._discard = discard
        self._handoffs: dict[bytes, PairedHandoff] = {}
        self._heart: asyncio.Task[None] | None = None
        self._look_every_s = context.options.silent_s / _LOOKS
        self._watch = VerdictWatch(context.options.silent_s, self._look_every_s)
        self._watching: asyncio.Task[None] | None = None
        self._canary = CanarySender(context, pair_digest(context.identity, receiver))
        self._link: Link | None = None
        self._relinking: asyncio.Task[None] | None = None
        self._measuring: asyncio.Task[LinkReport] | None = None
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def transport(self) -> Transport:
        assert self._link is not None
        return self._link.transport

    @property
    def version(self) -> int:
        """Of the wire: the newest that both sides speak."""
        assert self._link is not None
        return self._link.version

    @property
    def report(self) -> LinkReport:
        """What the canary found."""
        assert self._link is not None
        return self._link.report

    @property
    def is_idle(self) -> bool:
        return not self._handoffs and self._relinking is None

    async def connect(self) -> None:
        """Makes the link, once. Raises TransferError."""
        self._link = await self._linker.link(self.receiver, self.client, self, self._canary)

    async def measure(self) -> LinkReport:
        """Sends another canary. Raises TransferError when it does not come through."""
        if self._relinking is not None:
            await asyncio.wait([self._relinking])
        measuring = self._measuring = self._measuring or asyncio.create_task(self._measure(), name="kv-canary")
        await asyncio.wait([measuring])
        if measuring.cancelled():
            raise TransferError(TransferCode.PEER_LOST, f"no longer connected to {self.receiver}")
        return measuring.result()

    async def _measure(self) -> LinkReport:
        link = self._link
        assert link is not None
        try:
            if link.report.is_verified:
                report = await self._canary.measure(link.outlet, link.transport.name, link.token)
                if self._link is link:
                    self._link = replace(link, report=replace(report, failed=link.report.failed))
        except CanaryFailed as error:
            self._linker.avoid(self.receiver, link.transport.name)
            if not self._fall_back(error.message):
                self.lose(TransferCode.PEER_LOST, f"{link.transport.name}: {error.message}")
                self.discard()
                raise
            assert self._relinking is not None
            await asyncio.wait([self._relinking])
            if self.is_closed:
                raise
        finally:
            self._measuring = None
        return self.report

    def push(self, fence: bytes, token: bytes, blocks: Pushes) -> None:
        """Sends blocks of a handoff."""
        if self._relinking is None and self._link is not None:
            self._watch.pushed(fence, [slot.index for slot, _ in blocks])
            if self._watching is None:
                self._watching = asyncio.create_task(self._watch_link(), name="kv-link-watch")
            self._link.outlet.push(fence, token, blocks)

    def doubt(self, fence: bytes) -> None:
        """The receiver waited for blocks of this handoff. Sending them again is of no use on a link that swallows them."""
        if self._relinking is None and self._link is not None and self._watch.is_doubtful(fence):
            self._link.outlet.break_off("blocks that were sent did not arrive")

    def cancel(self, fence: bytes, when_quiet: Callable[[], None]) -> None:
        """Sends no more of a handoff. ``when_quiet`` is called when none of its blocks is being read here."""
        assert self._link is not None
        self._watch.dropped(fence)
        self._link.outlet.cancel(fence, when_quiet)

    def add(self, handoff: PairedHandoff) -> None:
        """From now on the handoff hears what concerns it, and its lease is renewed while it holds one."""
        self._handoffs[handoff.id.digest] = handoff
        if self._heart is None:
            self._heart = asyncio.create_task(self._beat(), name="kv-heartbeat")

    def remove(self, handoff: PairedHandoff) -> None:
        self._watch.dropped(handoff.id.digest)
        self._handoffs.pop(handoff.id.digest, None)

    def lose(self, code: TransferCode, reason: str) -> None:
        """The receiver is gone: every handoff with it ends."""
        for handoff in list(self._handoffs.values()):
            handoff.feed(m.PeerLost(reason, code))

    def discard(self) -> None:
        """Makes way for a new handshake."""
        if not self.is_closed:
            self.is_closed = True
            self._discard(self)

    def wait_for(self, call: asyncio.Task[None]) -> None:
        """The receiver is being told something by this pair's channel: it is not closed before that."""
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def close(self) -> None:
        self.is_closed = True
        self.lose(TransferCode.PEER_LOST, f"no longer connected to {self.receiver}")
        running = (self._heart, self._watching, self._relinking, self._measuring)
        tasks: list[asyncio.Task[Any]] = [task for task in running if task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._link is not None:
            await self._link.outlet.close()
        if self._calls:
            await asyncio.wait(self._calls, timeout=self._context.options.close_timeout_s)
        await self.client.close()

    # Another transport.

    def _fall_back(self, reason: str) -> bool:
        """Goes on by another transport, if there is one. What comes in the meantime waits for it."""
        name = self.transport.name
        if self._relinking is not None:
            return True
        if self.is_closed or [other for other in self._linker.candidates(self.receiver) if other != name] == []:
            return False
        self._linker.avoid(self.receiver, name)
        self._relinking = asyncio.create_task(self._relink(f"{name}: {reason}"), name="kv-fallback")
        return True

    async def _relink(self, reason: str) -> None:
        link = self._link
        assert link is not None
        self._watch.clear()
        try:
            self._canary.on_lost(TransferCode.PEER_LOST, reason)
            await link.outlet.close()
            self._link = await self._linker.link(
                self.receiver, self.client, self, self._canary, failed=[reason], keeps_handoffs=True
            )
        except TransferError as error:
            _log.warning("kv_fallback_failed", receiver=str(self.receiver), reason=error.message)
            self._relinking = None
            self.lose(error.code, error.message)
            self.discard()
            return
        self._relinking = None
        failed = self._link.report.failed
        _log.warning("kv_fell_back", receiver=str(self.receiver), transport=self.transport.name, failed=failed)
        self._context.stats.fallbacks.update(entry.partition(":")[0] for entry in failed)
        for handoff in list(self._handoffs.values()):
            handoff.fell_back(failed)
            if handoff.holds_lease:
                handoff.feed(m.LinkLost(f"{link.transport.name} has failed"))

    # What the outlet reports.

    def on_sent(self, fence: bytes, blocks: tuple[tuple[int, int], ...]) -> None:
        if fence == self._canary.fence:
            return
        self._context.stats.bytes_sent[self.transport.name] += len(blocks) * self._context.memory.block_bytes
        if (handoff := self._handoffs.get(fence)) is not None:
            handoff.feed(m.BlocksSent(blocks))

    def on_verdicts(self, fence: bytes, landed: tuple[int, ...], corrupt: tuple[int, ...]) -> None:
        self._watch.judged(fence, (*landed, *corrupt))
        if fence == self._canary.fence:
            self._canary.on_verdicts(landed, corrupt)
            return
        if (
            corrupt and self._link is not None
        ):  # before the machine sends them again, so that they go by the other transport
            self._fall_back(f"{len(corrupt)} blocks arrived corrupt")
        if (handoff := self._handoffs.get(fence)) is not None:
            handoff.feed(m.Verdicts(handoff.id, landed, corrupt))

    def on_gone(self, fence: bytes, code: TransferCode, reason: str) -> None:
        if fence == self._canary.fence:
            self._canary.on_gone(code, reason)
            return
        if (handoff := self._handoffs.get(fence)) is not None:
            handoff.feed(m.Refuse(handoff.id, code, reason))

    def on_link_lost(self, reason: str) -> None:
        _log.info("kv_link_lost", receiver=str(self.receiver), reason=reason)
        self._watch.clear()
        self._canary.on_lost(TransferCode.PEER_LOST, reason)
        if self._link is None or self._relinking is not None:
            return  # whoever makes the link hears it from the canary
        if not self._handoffs:
            self.discard()  # perhaps it will never be needed again; else a handshake costs little
        for handoff in list(self._handoffs.values()):
            if handoff.holds_lease:
                handoff.feed(m.LinkLost(reason))

    def on_unreachable(self, code: TransferCode, reason: str) -> None:
        _log.warning("kv_peer_unreachable", receiver=str(self.receiver), reason=reason)
        self._watch.clear()
        self._canary.on_lost(code, reason)
        if self._link is None or self._relinking is not None:
            return
        for handoff in list(self._handoffs.values()):
            if handoff.holds_lease:
                handoff.feed(m.PeerLost(reason, code))
        if code is TransferCode.STALE or not self._handoffs:
            self.discard()

    async def _watch_link(self) -> None:
        """A peer, or what is between, that takes blocks and says nothing is as good as none: the connection is made anew."""
        try:
            while self._watch.num_blocks:
                still_s = self._watch.look(self._needed_s(), self._context.clock())
                if still_s is not None and self._link is not None:
                    num_blocks = self._watch.num_blocks
                    self._link.outlet.break_off(f"no word of {num_blocks} blocks for {still_s:.1f} s")
                await asyncio.sleep(self._look_every_s)
        finally:
            self._watching = None

    def _needed_s(self) -> float:
        """What the next verdict may take to come: on all that is under way, or on a frame of it."""
        assert self._link is not None
        report, options, block_bytes = self.report, self._context.options, self._context.memory.block_bytes
        num_bytes = max(block_bytes, min(self._watch.num_blocks * block_bytes, self._link.outlet.max_frame_bytes))
        bytes_per_s = min(options.min_bytes_per_s, report.gb_per_s * 1e9 / 2 or options.min_bytes_per_s)
        return 2 * report.rtt_ms / 1e3 + num_bytes / bytes_per_s

    async def _beat(self) -> None:
        try:
            while self._handoffs:
                await asyncio.sleep(self._context.options.heartbeat_s)
                await self._renew([handoff for handoff in self._handoffs.values() if handoff.holds_lease])
        finally:
            self._heart = None

    async def _renew(self, live: list[PairedHandoff]) -> None:
        if not live:
            return
        sent_s = self._context.clock()
        keys = [handoff.id.key for handoff in live]
        try:
            await failpoint.reach_async("lease.renew")
            reply = await self.client.heartbeat(self._context.identity, self.receiver, keys)
        except TransferError as error:
            _log.warning("kv_heartbeat_failed", receiver=str(self.receiver), reason=error.message)
            if error.code is TransferCode.STALE:
                self.lose(error.code, error.message)
                self.discard()
            return  # otherwise the leases decide
        for handoff in live:
            if not handoff.holds_lease:
                continue
            if handoff.id.key in reply.unknown:
                reason = f"{self.receiver} no longer knows this handoff"
                handoff.feed(m.Refuse(handoff.id, TransferCode.UNKNOWN_HANDOFF, reason))
            else:
                handoff.feed(m.Renewed(handoff.id, sent_s))
