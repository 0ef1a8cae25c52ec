"""What is known of the way from one worker to another, for those that exchange blocks: the link matrix. Pure.

A canary (a block sent ahead of need, verified by the receiver) says whether a pair works, by which transport, and how fast.
Real transfers then correct the figures and feed a breaker for each transport of the pair. A pair that nobody has measured is
usable, at the default price; one whose canary failed is not, until a later one comes through.

Fetches go the same ways, and count for and against them. They also have a breaker of their own, which opens at the first
failure of any cause: a fetch that fails has cost a request its patience, and was never needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from baton.services.core.breaker import Breaker, BreakerLimits
from baton.services.core.cost_model import LinkCost
from baton.services.core.errors import BatonError, ErrorCode

_NEWEST_WEIGHT = 0.2  # of a transfer's report in the average: a change shows within about ten transfers
# Transfers of fewer bytes say little about bandwidth: their time is the calls around them.
_MIN_MEASURED_BYTES = 256 * 1024
OTHER_TRANSPORT = "other_transport"
"""A fallback below the ladder's rungs: the same pair went on by another transport in the middle of a handoff."""

# What a holder or its peer says at once to a fetch, and may not say the next time.
_PASSING_CAUSES = frozenset({"evicted", "no_capacity", "draining"})
_FETCH_LIMITS = BreakerLimits(max_failures=1, open_s=5.0, max_open_s=80.0)
# Causes of a failed handoff that speak against the way. Not among them: no room, a deadline, somebody who gave up.
_LINK_CAUSES = frozenset({"checksum", "peer_lost", "incomplete", "digest_mismatch", "protocol", "not_granted"})
# Nothing is quicker or slower than this: a clock's resolution, a measurement on a stopped machine.
_MIN_BYTES_PER_S, _MAX_BYTES_PER_S = 1e6, 1e12


class PairKey(NamedTuple):
    """Two processes by their incarnations: who sends blocks and who gets them.

    For a handoff these are a prefill and a decode worker; for a fetch the holder stands first, whatever its role.
    """

    prefill: str
    decode: str


class LinkState(StrEnum):
    """What the last canary said."""

    UNKNOWN = "unknown"  # none has been sent yet
    VERIFIED = "verified"  # it came through
    UNVERIFIED = "unverified"  # the two pair, but are of a version that cannot probe
    FAILED = "failed"  # it did not come through, or the two cannot pair


class Standing(StrEnum):
    """How the router treats a pair."""

    FINE = "fine"
    OPEN = "open"  # its breaker is open: only where there is no other
    FAILED = "failed"  # not at all


@dataclass(slots=True)
class Link:
    """One pair. Times are the caller's clock."""

    state: LinkState = LinkState.UNKNOWN
    transport: str = ""
    rtt_ms: float = 0.0
    gb_per_s: float = 0.0
    probed_s: float | None = None
    reason: str = ""  # why it failed
    failed_transports: tuple[str, ...] = ()  # tried before ``transport``, each with the reason why it does not work
    price: LinkCost | None = None  # what the figures make; None while nobody has measured it
    num_transfers: int = 0
    num_failures: int = 0
    breakers: dict[str, Breaker] = field(default_factory=dict)  # by transport
    fetching: Breaker = field(default_factory=lambda: Breaker(_FETCH_LIMITS))

    @property
    def is_calm(self) -> bool:
        """Nothing speaks against it, for handoffs or for fetches."""
        breaker = self.breakers.get(self.transport)
        is_closed = breaker is None or breaker.is_closed
        return is_closed and self.state is not LinkState.FAILED and self.fetching.is_closed


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe of a pair brought."""

    transport: str = ""
    is_verified: bool = False
    rtt_ms: float = 0.0
    gb_per_s: float = 0.0
    failed_transports: tuple[str, ...] = ()
    error: str | None = None  # no transport works


_NO_LINKS: Mapping[str, Link] = {}


class LinkView(Protocol):
    """What the router reads."""

    def cost(self, pair: PairKey) -> LinkCost | None:
        """What transfers cost; None while nobody has measured it."""
        ...

    def row(self, prefill: str) -> Mapping[str, Link]:
        """All that is known of the ways from one worker, by the incarnation at the other end."""
        ...

    def standing(self, pair: PairKey, now: float) -> Standing: ...

    def may_fetch(self, pair: PairKey, now: float) -> bool:
        """Whether blocks are fetched this way: they need not be."""
        ...

    def num_failures(self, pair: PairKey, now: float) -> int:
        """Lately; among pairs that are all bad, fewer is better."""
        ...


class LinkMatrix:
    """All pairs. Lives on the gateway's event loop."""

    def __init__(self, limits: BreakerLimits | None = None) -> None:
        self._limits = limits
        self._links: dict[PairKey, Link] = {}
        self._rows: dict[str, dict[str, Link]] = {}
        self._troubled: set[PairKey] = set()  # has failed, and may be well again

    def get(self, pair: PairKey) -> Link:
        """What is known of a pair, perhaps nothing."""
        return self._links.get(pair) or Link()

    def pairs(self) -> list[PairKey]:
        return list(self._links)

    def forget_all_but(self, alive: Iterable[str]) -> None:
        """Drops pairs with a process that is gone."""
        known = set(alive)
        self._troubled = {pair for pair in self._troubled if {pair.prefill, pair.decode} <= known}
        for pair in [pair for pair in self._links if not {pair.prefill, pair.decode} <= known]:
            del self._links[pair], self._rows[pair.prefill][pair.decode]
            if not self._rows[pair.prefill]:
                del self._rows[pair.prefill]

    # What is heard.

    def on_probe(self, pair: PairKey, result: ProbeResult, now: float) -> None:
        """A canary came through, or did not."""
        link = self._link(pair)
        link.probed_s, link.failed_transports = now, result.failed_transports
        if result.error is not None:
            link.state, link.reason = LinkState.FAILED, result.error
            self._troubled.add(pair)
            self._breaker(link).on_failure(now)
            return
        if link.transport != result.transport or link.state is LinkState.FAILED:
            link.rtt_ms = link.gb_per_s = 0.0  # an average with another way's figures would be nobody's
        link.state = LinkState.VERIFIED if result.is_verified else LinkState.UNVERIFIED
        link.transport, link.reason = result.transport, ""
        link.rtt_ms = _blend(link.rtt_ms, result.rtt_ms)
        if result.gb_per_s > 0:
            link.gb_per_s = _blend(link.gb_per_s, result.gb_per_s)
        link.price = _price(link)
        self._breaker(link).on_success(now)

    def on_start(self, pair: PairKey, now: float) -> None:
        """A handoff begins."""
        self._breaker(self._link(pair)).on_try(now)

    def on_transfer(self, pair: PairKey, transport: str, num_bytes: int, duration_ms: float, now: float) -> None:
        """A handoff was acknowledged. ``duration_ms`` is from its grant to its end."""
        link = self._link(pair)
        if link.transport and transport != link.transport:
            # By the way, it found out that another one fails.
            self._breaker(link).on_failure(now)
            link.gb_per_s = 0.0
        link.transport = transport or link.transport
        link.num_transfers += 1
        self._breaker(link).on_success(now)
        if num_bytes >= _MIN_MEASURED_BYTES and duration_ms > 0:
            # Blocks go while later ones are computed, so a duration can only hide bandwidth, never invent it.
            seen = num_bytes / duration_ms / 1e6
            if seen > link.gb_per_s:
                link.gb_per_s = _blend(link.gb_per_s, seen)
        link.price = _price(link)

    def on_failure(self, pair: PairKey, now: float) -> None:
        """A handoff failed on its way."""
        link = self._link(pair)
        link.num_failures += 1
        self._troubled.add(pair)
        self._breaker(link).on_failure(now)

    def on_over(self, pair: PairKey, now: float) -> None:
        """A handoff ended without saying anything about the way."""
        link = self._links.get(pair)
        if link is not None:
            self._breaker(link).on_over(now)

    def on_fetch_start(self, pair: PairKey, now: float) -> None:
        """A fetch begins."""
        self.on_start(pair, now)
        self._links[pair].fetching.on_try(now)

    def on_fetched(self, pair: PairKey, transport: str, num_bytes: int, duration_ms: float, now: float) -> None:
        """The blocks came."""
        self.on_transfer(pair, transport, num_bytes, duration_ms, now)
        self._links[pair].fetching.on_success(now)

    def on_fetch_failed(self, pair: PairKey, cause: str, now: float) -> None:
        """The blocks did not come. ``cause`` is the transfer's error code."""
        link = self._link(pair)
        if cause in _LINK_CAUSES:
            self.on_failure(pair, now)
        else:
            self._breaker(link).on_over(now)
        if cause in _PASSING_CAUSES:
            link.fetching.on_over(now)
        else:
            link.fetching.on_failure(now)

    def on_fetch_over(self, pair: PairKey, now: float) -> None:
        """A fetch ended, and nobody said how."""
        if (link := self._links.get(pair)) is not None:
            self._breaker(link).on_over(now)
            link.fetching.on_over(now)

    # What is asked.

    def troubled(self) -> list[PairKey]:
        """Pairs that something speaks against."""
        self._troubled = {pair for pair in self._troubled if pair in self._links and not self._links[pair].is_calm}
        return sorted(self._troubled)

    def cost(self, pair: PairKey) -> LinkCost | None:
        link = self._links.get(pair)
        return None if link is None else link.price

    def row(self, prefill: str) -> Mapping[str, Link]:
        return self._rows.get(prefill, _NO_LINKS)

    def standing(self, pair: PairKey, now: float) -> Standing:
        link = self._links.get(pair)
        if link is None:
            return Standing.FINE
        if link.state is LinkState.FAILED:
            return Standing.FAILED
        return Standing.FINE if self._breaker(link).allows(now) else Standing.OPEN

    def may_fetch(self, pair: PairKey, now: float) -> bool:
        link = self._links.get(pair)
        return link is None or (self.standing(pair, now) is Standing.FINE and link.fetching.allows(now))

    def num_failures(self, pair: PairKey, now: float) -> int:
        link = self._links.get(pair)
        return 0 if link is None else self._breaker(link).num_failures(now)

    def breaker_state(self, pair: PairKey, now: float) -> str:
        """Of the transport that the pair uses."""
        link = self._links.get(pair)
        return "closed" if link is None else self._breaker(link).state(now).value

    def _link(self, pair: PairKey) -> Link:
        link = self._links.get(pair)
        if link is None:
            link = self._links[pair] = self._rows.setdefault(pair.prefill, {})[pair.decode] = Link()
        return link

    def _breaker(self, link: Link) -> Breaker:
        breaker = link.breakers.get(link.transport)
        if breaker is None:
            breaker = link.breakers[link.transport] = Breaker(self._limits)
        return breaker


def blames_link(error: BatonError | None) -> bool:
    """Whether a worker's failure speaks against the way between the two."""
    return error is not None and error.code is ErrorCode.HANDOFF_FAILED and error.cause in _LINK_CAUSES


def _price(link: Link) -> LinkCost | None:
    if link.gb_per_s <= 0:
        return None
    bytes_per_s = min(max(link.gb_per_s * 1e9, _MIN_BYTES_PER_S), _MAX_BYTES_PER_S)
    return LinkCost(fixed_s=link.rtt_ms / 1e3, bytes_per_s=bytes_per_s)


def _blend(before: float, now: float) -> float:
    return now if before == 0.0 else (1 - _NEWEST_WEIGHT) * before + _NEWEST_WEIGHT * now
