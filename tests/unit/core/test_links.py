"""The link matrix: what canaries, transfers and failures make of a pair."""

from __future__ import annotations

import pytest

from baton.services.core.breaker import BreakerLimits
from baton.services.core.cost_model import LinkCost
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.links import LinkMatrix, LinkState, PairKey, ProbeResult, Standing, blames_link

PAIR, OTHER = PairKey("p0", "d0"), PairKey("p0", "d1")
GOOD = ProbeResult("shm", True, 2.0, 4.0)


def matrix() -> LinkMatrix:
    return LinkMatrix(BreakerLimits(max_failures=2, open_s=5.0))


def test_a_pair_that_nobody_has_measured_is_usable_at_the_default_price() -> None:
    links = matrix()
    assert links.standing(PAIR, 0.0) is Standing.FINE
    assert links.cost(PAIR) is None
    assert links.get(PAIR).state is LinkState.UNKNOWN
    links.on_probe(PAIR, ProbeResult("tcp", is_verified=False), 0.0)  # a version without canaries
    assert links.get(PAIR).state is LinkState.UNVERIFIED
    assert links.cost(PAIR) is None


def test_a_canary_gives_the_price() -> None:
    links = matrix()
    links.on_probe(PAIR, GOOD, 7.0)
    link = links.get(PAIR)
    assert (link.state, link.transport, link.probed_s) == (LinkState.VERIFIED, "shm", 7.0)
    assert links.cost(PAIR) == LinkCost(fixed_s=2e-3, bytes_per_s=4e9)
    assert links.cost(OTHER) is None


def test_later_canaries_are_averaged_unless_the_way_has_changed() -> None:
    links = matrix()
    links.on_probe(PAIR, GOOD, 0.0)
    links.on_probe(PAIR, ProbeResult("shm", True, 7.0, 9.0), 1.0)
    assert (links.get(PAIR).rtt_ms, links.get(PAIR).gb_per_s) == (pytest.approx(3.0), pytest.approx(5.0))
    failed = ("shm: the canary arrived corrupt",)
    links.on_probe(PAIR, ProbeResult("tcp", True, 9.0, 1.0, failed), 2.0)
    link = links.get(PAIR)
    assert (link.transport, link.rtt_ms, link.gb_per_s, link.failed_transports) == ("tcp", 9.0, 1.0, failed)


def test_a_pair_whose_canary_failed_is_out_until_one_comes_through() -> None:
    links = matrix()
    links.on_probe(PAIR, GOOD, 0.0)
    links.on_probe(PAIR, ProbeResult(error="peer_lost: no transport works"), 1.0)
    assert links.standing(PAIR, 1.0) is Standing.FAILED
    assert links.get(PAIR).reason == "peer_lost: no transport works"
    links.on_probe(PAIR, GOOD, 2.0)
    assert links.standing(PAIR, 2.0) is Standing.FINE
    assert links.get(PAIR).reason == ""


def test_transfers_that_were_faster_correct_the_bandwidth() -> None:
    links = matrix()
    links.on_probe(PAIR, GOOD, 0.0)
    links.on_transfer(PAIR, "shm", 9_000_000, 1.0, 1.0)  # 9 GB/s
    assert links.get(PAIR).gb_per_s == pytest.approx(5.0)
    links.on_transfer(PAIR, "shm", 9_000_000, 1e3, 2.0)  # computing took that long, not the transfer
    links.on_transfer(PAIR, "shm", 1000, 1e-6, 3.0)  # too few bytes to say anything
    assert links.get(PAIR).gb_per_s == pytest.approx(5.0)
    assert links.get(PAIR).num_transfers == 3


def test_a_transfer_that_found_another_way_counts_against_the_first() -> None:
    links = matrix()
    links.on_probe(PAIR, GOOD, 0.0)
    links.on_transfer(PAIR, "tcp", 9_000_000, 9.0, 1.0)
    link = links.get(PAIR)
    assert (link.transport, link.gb_per_s) == ("tcp", pytest.approx(1.0))
    assert link.breakers["shm"].num_failures(1.0) == 1
    assert link.breakers["tcp"].num_failures(1.0) == 0


def test_failures_open_the_breaker_of_the_pair_and_its_transport_only() -> None:
    links = matrix()
    links.on_probe(PAIR, GOOD, 0.0)
    links.on_failure(PAIR, 1.0)
    assert links.standing(PAIR, 1.0) is Standing.FINE
    links.on_failure(PAIR, 2.0)
    assert (links.standing(PAIR, 2.0), links.breaker_state(PAIR, 2.0)) == (Standing.OPEN, "open")
    assert links.standing(OTHER, 2.0) is Standing.FINE
    assert links.breaker_state(PAIR, 7.0) == "half_open"
    links.on_start(PAIR, 7.0)
    assert links.standing(PAIR, 7.0) is Standing.OPEN  # one is on its way
    links.on_over(PAIR, 7.5)
    assert links.standing(PAIR, 7.5) is Standing.FINE
    links.on_probe(PAIR, ProbeResult("tcp", True, 1.0, 1.0), 8.0)  # by another way it begins afresh
    assert links.standing(PAIR, 8.0) is Standing.FINE


def test_pairs_of_processes_that_are_gone_are_forgotten() -> None:
    links = matrix()
    links.on_probe(PAIR, GOOD, 0.0)
    links.on_probe(OTHER, GOOD, 0.0)
    links.forget_all_but(["p0", "d1"])
    assert links.pairs() == [OTHER]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BatonError(ErrorCode.HANDOFF_FAILED, "x", cause="checksum"), True),
        (BatonError(ErrorCode.HANDOFF_FAILED, "x", cause="peer_lost"), True),
        (BatonError(ErrorCode.HANDOFF_FAILED, "x", cause="no_capacity"), False),
        (BatonError(ErrorCode.HANDOFF_FAILED, "x", cause="aborted"), False),
        (BatonError(ErrorCode.HANDOFF_FAILED, "x"), False),
        (BatonError(ErrorCode.WORKER_LOST, "x", cause="checksum"), False),
        (None, False),
    ],
)
def test_only_what_went_wrong_on_the_way_blames_it(error: BatonError | None, expected: bool) -> None:
    assert blames_link(error) is expected


# Fetches.


def test_after_each_fetch_that_fails_the_way_is_left_alone_for_longer() -> None:
    links, lengths, now = matrix(), [], 0.0
    for _ in range(6):
        links.on_fetch_start(PAIR, now)
        links.on_fetch_failed(PAIR, "expired", now)
        length = next(s for s in range(1, 200) if links.may_fetch(PAIR, now + s))
        lengths.append(length)
        now += length
    assert lengths == [5, 10, 20, 40, 80, 80]
    assert links.standing(PAIR, now) is Standing.FINE  # that it took too long says nothing about the way
    links.on_fetched(PAIR, "shm", 0, 1.0, now)
    links.on_fetch_failed(PAIR, "expired", now)
    assert not links.may_fetch(PAIR, now + 4.0)
    assert links.may_fetch(PAIR, now + 5.0)


@pytest.mark.parametrize("cause", ["evicted", "no_capacity", "draining"])
def test_what_passes_by_itself_speaks_against_nothing(cause: str) -> None:
    links = matrix()
    links.on_fetch_failed(PAIR, cause, 0.0)
    assert links.may_fetch(PAIR, 0.0)
    assert links.num_failures(PAIR, 0.0) == 0


@pytest.mark.parametrize("cause", ["checksum", "peer_lost", "incomplete"])
def test_a_fetch_that_fails_on_its_way_counts_like_a_handoff_that_does(cause: str) -> None:
    links = matrix()
    links.on_fetch_failed(PAIR, cause, 0.0)
    assert links.standing(PAIR, 0.0) is Standing.FINE
    links.on_failure(PAIR, 1.0)
    assert links.standing(PAIR, 1.0) is Standing.OPEN
    assert links.get(PAIR).num_failures == 2
    assert links.standing(OTHER, 1.0) is Standing.FINE


def test_a_fetch_that_comes_through_closes_the_breaker_for_both() -> None:
    links = matrix()
    links.on_failure(PAIR, 0.0)
    links.on_failure(PAIR, 0.0)
    assert not links.may_fetch(PAIR, 1.0)  # handoffs failed, so blocks are not fetched either
    assert links.may_fetch(PAIR, 5.0)
    links.on_fetch_start(PAIR, 5.0)
    assert not links.may_fetch(PAIR, 5.0)  # one try
    links.on_fetched(PAIR, "shm", 1 << 20, 1.0, 5.5)
    assert links.breaker_state(PAIR, 5.5) == "closed"
    assert links.may_fetch(PAIR, 5.5)
    assert links.get(PAIR).num_transfers == 1


def test_a_fetch_whose_end_nobody_told_lets_the_next_one_try() -> None:
    links = matrix()
    links.on_fetch_failed(PAIR, "peer_lost", 0.0)
    links.on_fetch_start(PAIR, 6.0)
    assert not links.may_fetch(PAIR, 7.0)
    links.on_fetch_over(PAIR, 7.0)
    assert links.may_fetch(PAIR, 7.0)


def test_what_has_failed_counts_as_troubled_until_it_is_well_again_or_gone() -> None:
    links = LinkMatrix()
    probed, used, gone = (PairKey("p", name) for name in ("probed", "used", "gone"))
    for pair in (probed, used, gone):
        links.on_probe(pair, ProbeResult("tcp", is_verified=True), 0.0)
    assert links.troubled() == []
    links.on_probe(probed, ProbeResult(error="no way"), 1.0)
    for _ in range(20):
        links.on_failure(used, 1.0)
        links.on_failure(gone, 1.0)
    assert links.troubled() == [gone, probed, used]
    links.forget_all_but({"p", "probed", "used"})
    assert links.troubled() == [probed, used]
    links.on_probe(probed, ProbeResult("tcp", is_verified=True), 2.0)
    assert links.troubled() == [used]
