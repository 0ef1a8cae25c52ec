"""The router: who may run a request, what each way costs, which is cheapest."""

from __future__ import annotations

import dataclasses

import pytest

from baton.kvtransfer.versions import VersionRange
from baton.services.core.cost_model import DecodeCost, LinkCost, WorkerCost, visible_transfer_s
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.links import LinkMatrix, PairKey, ProbeResult
from baton.services.core.router import Mode, Placement, Role, RoutedRequest, WorkerView, route


def worker(worker_id: str, role: Role, **changes: object) -> WorkerView:
    view = WorkerView(worker_id, f"inc-{worker_id}", role, f"127.0.0.1:{len(worker_id)}", "same", "host")
    return dataclasses.replace(view, **changes)  # type: ignore[arg-type]


def request(num_tokens: int = 640, **changes: object) -> RoutedRequest:
    routed = RoutedRequest("r1", num_tokens, 16, 65536, {})
    return dataclasses.replace(routed, **changes)  # type: ignore[arg-type]


P0, P1 = worker("p0", Role.PREFILL), worker("p1", Role.PREFILL)
D0, D1 = worker("d0", Role.DECODE), worker("d1", Role.DECODE)


def test_a_prompt_goes_through_both_pools_when_there_are_both() -> None:
    decision = route(request(), [P0, D0])
    assert decision.chosen.mode is Mode.REMOTE
    assert (decision.chosen.prefill, decision.chosen.decode) == (P0, D0)
    assert decision.runner_up is not None
    assert decision.runner_up.mode is Mode.LOCAL


def test_the_queue_of_a_prefill_worker_counts() -> None:
    busy = dataclasses.replace(P0, queued_tokens=50_000)
    assert route(request(), [busy, P1, D0]).chosen.prefill == P1


def test_a_cached_prefix_outweighs_a_short_queue() -> None:
    busy = dataclasses.replace(P0, queued_tokens=100)
    decision = route(request(cached_blocks={"p0": 39}), [busy, P1, D0])
    assert decision.chosen.prefill == busy


def test_blocks_that_the_decoder_holds_need_not_travel() -> None:
    far = dataclasses.replace(D0, host_id="other")
    far_cached = dataclasses.replace(D1, host_id="other")
    assert route(request(cached_blocks={"d1": 40}), [P0, far, far_cached]).chosen.decode == far_cached


def test_a_full_decoder_is_avoided() -> None:
    full = dataclasses.replace(D0, running=256)
    assert route(request(), [P0, full, D1]).chosen.decode == D1
    out_of_blocks = dataclasses.replace(D0, available_blocks=3)
    assert route(request(), [P0, out_of_blocks, D1]).chosen.decode == D1


@pytest.mark.parametrize(
    ("learned", "most_apart"),
    [(None, 2), (DecodeCost(0.01, 0.0), 8)],
    ids=["nothing was learned", "that a batch costs nothing was learned"],
)
def test_a_link_that_is_quicker_by_a_hair_does_not_get_every_stream(
    learned: DecodeCost | None, most_apart: int
) -> None:
    links = LinkMatrix()
    decoders = [dataclasses.replace(decoder, cost=WorkerCost(decode=learned)) for decoder in (D0, D1)]
    for decoder, rtt_ms in zip(decoders, (0.5, 3.0), strict=True):
        measured = ProbeResult("tcp", is_verified=True, rtt_ms=rtt_ms, gb_per_s=1.0)
        links.on_probe(PairKey(P0.incarnation, decoder.incarnation), measured, now=0.0)
    assert route(request(), [P0, *decoders], links=links).chosen.decode == decoders[0]
    running = {D0.worker_id: 0, D1.worker_id: 0}
    for _ in range(32):
        workers = [dataclasses.replace(decoder, running=running[decoder.worker_id]) for decoder in decoders]
        running[route(request(), [P0, *workers], links=links).chosen.decode.worker_id] += 1
    assert max(running.values()) - min(running.values()) <= most_apart, running


def test_a_pair_that_failed_together_is_avoided_and_its_workers_are_not() -> None:
    failed = request(excluded_pairs={(P0.incarnation, D0.incarnation)})
    assert route(failed, [P0, D0, D1]).chosen.workers == (P0, D1)
    assert route(failed, [P0, P1, D0]).chosen.workers == (P1, D0)
    assert route(failed, [P0, D0]).chosen.mode is Mode.LOCAL


def test_a_worker_that_holds_blocks_of_the_request_comes_before_a_cheaper_one() -> None:
    busy = dataclasses.replace(P0, queued_tokens=50_000)
    assert route(request(preferred={P0.incarnation}), [busy, P1, D0, D1]).chosen.prefill == busy
    full = dataclasses.replace(D0, running=256)
    assert route(request(preferred={D0.incarnation}), [P0, full, D1]).chosen.decode == full


def test_incompatible_workers_never_pair() -> None:
    decision = route(request(), [dataclasses.replace(P0, compatibility="other"), D0])
    assert decision.chosen.mode is Mode.LOCAL
    assert "no usable prefill worker" in decision.reason


def test_a_failed_incarnation_is_not_tried_again() -> None:
    assert route(request(excluded={"inc-p0"}), [P0, P1, D0]).chosen.prefill == P1
    with pytest.raises(BatonError) as failure:
        route(request(excluded={"inc-d0"}), [P0, D0])
    assert failure.value.code is ErrorCode.NO_WORKERS
    assert failure.value.retryable
    assert "1 already failed this request" in failure.value.message


def test_without_any_worker_the_error_says_so() -> None:
    with pytest.raises(BatonError, match="no worker is ready"):
        route(request(), [])


def test_colocated_workers_run_the_whole_request() -> None:
    decision = route(request(), [worker("c0", Role.COLOCATED)])
    assert decision.chosen.mode is Mode.COLOCATED
    assert decision.chosen.prefill is None


def test_equal_workers_share_equal_work() -> None:
    chosen = [route(request(request_id=f"r{i}"), [P0, P1, D0, D1]).chosen for i in range(400)]
    for pair in {(c.prefill, c.decode) for c in chosen if c.prefill}:
        assert 60 <= sum((c.prefill, c.decode) == pair for c in chosen) <= 140


def test_equal_requests_get_equal_decisions() -> None:
    assert route(request(), [P0, P1, D0, D1]) == route(request(), [D1, P1, D0, P0])


def test_prices_are_sums_of_their_parts() -> None:
    slow = dataclasses.replace(P0, queued_tokens=1000, cost=WorkerCost(prefill_s_per_token=1e-3))
    chosen = route(request(num_tokens=100), [slow, D0]).chosen
    assert chosen.queue_s == pytest.approx(1.0)
    assert chosen.prefill_s == pytest.approx(0.1)
    assert chosen.ttft_s == pytest.approx(chosen.queue_s + chosen.prefill_s + chosen.transfer_s + chosen.decode_wait_s)


def test_only_the_last_chunk_of_a_transfer_is_visible() -> None:
    link = LinkCost(fixed_s=1e-3, bytes_per_s=1e9)
    assert visible_transfer_s(link, 10_000_000, 1_000_000) == pytest.approx(2e-3)
    assert visible_transfer_s(link, 500_000, 1_000_000) == pytest.approx(1.5e-3)


def test_placement_local_keeps_the_prompt_on_the_decode_worker() -> None:
    decision = route(request(), [P0, D0], Placement.LOCAL)
    assert decision.chosen.mode is Mode.LOCAL
    assert "placement is local" in decision.reason
    assert decision.runner_up is not None
    assert decision.runner_up.mode is Mode.REMOTE


def test_placement_auto_weighs_the_handoff_against_the_streams_it_would_disturb() -> None:
    assert route(request(), [P0, D0], Placement.AUTO).chosen.mode is Mode.LOCAL
    busy = dataclasses.replace(D0, running=8)
    assert route(request(), [P0, busy], Placement.AUTO).chosen.mode is Mode.REMOTE
    assert route(request(cached_blocks={"d0": 40}), [P0, busy], Placement.AUTO).chosen.mode is Mode.LOCAL


# What is known of the way between two.


def pair(prefill: WorkerView, decode: WorkerView) -> PairKey:
    return PairKey(prefill.incarnation, decode.incarnation)


def test_a_measured_link_is_priced_as_measured() -> None:
    links = LinkMatrix()
    slow, fast = ProbeResult("tcp", True, 30.0, 0.01), ProbeResult("shm", True, 0.5, 8.0)
    links.on_probe(pair(P0, D0), slow, 0.0)
    links.on_probe(pair(P1, D0), fast, 0.0)
    decision = route(request(), [P0, P1, D0], links=links)
    assert decision.chosen.prefill == P1
    assert decision.chosen.transfer_s == pytest.approx(0.5e-3 + 40 * 65536 / 8e9)
    assert decision.runner_up is not None
    assert decision.runner_up.transfer_s == pytest.approx(30e-3 + 40 * 65536 / 0.01e9)


def test_a_pair_whose_canary_failed_is_no_candidate() -> None:
    links = LinkMatrix()
    links.on_probe(pair(P0, D0), ProbeResult(error="nothing works"), 0.0)
    assert route(request(), [P0, P1, D0], links=links).chosen.prefill == P1
    assert route(request(), [P0, D0], links=links).chosen.mode is Mode.LOCAL


def test_a_pair_with_an_open_breaker_is_taken_only_where_there_is_no_other() -> None:
    links = LinkMatrix()
    busy = dataclasses.replace(P1, queued_tokens=50_000)
    for _ in range(3):
        links.on_failure(pair(P0, D0), 0.0)
    assert route(request(), [P0, busy, D0], links=links, now=1.0).chosen.prefill == busy
    assert route(request(), [P0, D0], links=links, now=1.0).chosen.prefill == P0  # never refused because of it
    for _ in range(4):
        links.on_failure(pair(busy, D0), 1.0)
    assert route(request(), [P0, busy, D0], links=links, now=1.0).chosen.prefill == P0  # the one that failed least


def test_half_open_lets_one_request_through() -> None:
    links = LinkMatrix()
    busy = dataclasses.replace(P1, queued_tokens=50_000)
    for _ in range(3):
        links.on_failure(pair(P0, D0), 0.0)
    assert route(request(), [P0, busy, D0], links=links, now=6.0).chosen.prefill == P0
    links.on_start(pair(P0, D0), 6.0)
    assert route(request(), [P0, busy, D0], links=links, now=6.0).chosen.prefill == busy
    links.on_transfer(pair(P0, D0), "shm", 100, 1.0, 7.0)
    assert route(request(), [P0, busy, D0], links=links, now=7.0).chosen.prefill == P0


OLD, NEW = VersionRange(1, 1), VersionRange(1, 2)
NEWER_STILL = VersionRange(3, 4)


@pytest.mark.parametrize(("prefill", "decode"), [(OLD, NEW), (NEW, OLD), (OLD, OLD), (VersionRange(2, 3), NEW)])
def test_workers_of_two_releases_in_a_row_pair(prefill: VersionRange, decode: VersionRange) -> None:
    one, other = dataclasses.replace(P0, wire_versions=prefill), dataclasses.replace(D0, wire_versions=decode)
    assert route(request(), [one, other]).chosen.mode is Mode.REMOTE


def test_in_the_middle_of_a_rolling_upgrade_only_workers_without_a_common_version_are_parted() -> None:
    workers = [
        dataclasses.replace(P0, wire_versions=OLD, queued_tokens=50_000),
        dataclasses.replace(P1, wire_versions=NEWER_STILL),
        dataclasses.replace(D0, wire_versions=NEW),
    ]
    assert route(request(), workers).chosen.prefill == workers[0]
    decision = route(request(), workers[1:])
    assert decision.chosen.mode is Mode.LOCAL
    assert "no usable prefill worker" in decision.reason
