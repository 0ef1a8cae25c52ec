"""What /ready says, from the first worker to the last."""

from __future__ import annotations

import dataclasses

import pytest

from baton.kvtransfer.versions import VersionRange
from baton.services.core.links import LinkMatrix, PairKey, ProbeResult
from baton.services.core.router import Role, WorkerView
from baton.services.gateway.readiness import Readiness


def view(role: Role, compatibility: str = "x") -> WorkerView:
    return WorkerView(role.value, "i", role, "a:1", compatibility)


PREFILL, DECODE, COLOCATED = view(Role.PREFILL), view(Role.DECODE), view(Role.COLOCATED)


@pytest.mark.parametrize("views", [[], [PREFILL], [DECODE], [PREFILL, view(Role.DECODE, "y")]])
def test_it_is_not_ready_before_the_first_pair_and_says_why(views: list[WorkerView]) -> None:
    is_ready, reason = Readiness().check(views)
    assert not is_ready
    assert reason


@pytest.mark.parametrize("views", [[PREFILL, DECODE], [COLOCATED], [view(Role.PREFILL, "y"), PREFILL, DECODE]])
def test_a_pair_or_a_colocated_worker_is_enough(views: list[WorkerView]) -> None:
    assert Readiness().check(views) == (True, "")


def test_workers_of_two_releases_in_a_row_are_a_pair_and_others_are_not() -> None:
    old, new, newest = (
        dataclasses.replace(PREFILL, wire_versions=VersionRange(*versions)) for versions in ((1, 1), (1, 2), (3, 4))
    )
    for prefill in (old, new):
        assert Readiness().check([prefill, DECODE]) == (True, "")
    is_ready, reason = Readiness().check([newest, DECODE])
    assert not is_ready
    assert "no prefill worker can exchange blocks" in reason
    links = LinkMatrix()
    links.on_probe(PairKey(PREFILL.incarnation, DECODE.incarnation), ProbeResult("tcp", is_verified=True), 0.0)
    assert not Readiness(links=links).check([newest, DECODE])[0]
    assert Readiness(links=links).check([old, DECODE]) == (True, "")


@pytest.mark.parametrize("left", [[DECODE], [DECODE, view(Role.PREFILL, "y")]])
def test_without_its_prefill_pool_it_stays_ready_and_names_the_loss(left: list[WorkerView]) -> None:
    readiness = Readiness()
    readiness.check([PREFILL, DECODE])
    is_ready, reason = readiness.check(left)
    assert is_ready
    assert "prefill worker" in reason
    assert readiness.check([PREFILL, DECODE]) == (True, "")


def test_without_any_decode_worker_it_is_not_ready_whatever_was_before() -> None:
    readiness = Readiness()
    readiness.check([PREFILL, DECODE])
    assert readiness.check([PREFILL]) == (False, "no decode worker is ready (1 other workers are)")
    assert not readiness.check([])[0]


def test_decode_workers_that_are_meant_to_be_alone_are_enough() -> None:
    assert Readiness(needs_pair=lambda: False).check([DECODE]) == (True, "")
    assert not Readiness(needs_pair=lambda: False).check([PREFILL])[0]


def test_a_pair_counts_once_a_canary_has_come_through() -> None:
    links, pair = LinkMatrix(), PairKey(PREFILL.incarnation, DECODE.incarnation)
    readiness = Readiness(links=links)
    assert readiness.check([PREFILL, DECODE]) == (
        False,
        "no usable pair: prefill to decode: no canary has come through yet",
    )
    links.on_probe(pair, ProbeResult(error="peer_lost: no transport works"), 0.0)
    assert readiness.check([PREFILL, DECODE]) == (
        False,
        "no usable pair: prefill to decode: peer_lost: no transport works",
    )
    links.on_probe(pair, ProbeResult("tcp", is_verified=True), 1.0)
    assert readiness.check([PREFILL, DECODE]) == (True, "")
    links.on_probe(pair, ProbeResult(error="peer_lost: no transport works"), 2.0)
    is_ready, reason = readiness.check([PREFILL, DECODE])
    assert is_ready
    assert reason.startswith("degraded: no usable pair: prefill to decode: peer_lost")


def test_a_pair_that_cannot_be_probed_will_do() -> None:
    links = LinkMatrix()
    links.on_probe(PairKey(PREFILL.incarnation, DECODE.incarnation), ProbeResult(), 0.0)
    assert Readiness(links=links).check([PREFILL, DECODE]) == (True, "")
