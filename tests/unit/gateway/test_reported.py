"""Sums over reports are what adding them up anew would give."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.api.common.v1 import common_pb2 as pb
from baton.services.gateway.reported import Reported

ROLES = st.sampled_from([pb.WORKER_ROLE_PREFILL, pb.WORKER_ROLE_DECODE, pb.WORKER_ROLE_COLOCATED])
REPORTS = st.builds(
    pb.WorkerStatus,
    role=ROLES,
    queued_tokens=st.integers(90, 990),
    batch_queued_tokens=st.integers(0, 90),
    max_model_len=st.sampled_from([0, 512, 4096, 8192]),
    running=st.integers(0, 8),
    prompt_share=st.floats(0.0, 1.0),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.none() | REPORTS), max_size=40))
def test_they_follow_every_report_and_every_loss(events: list[tuple[int, pb.WorkerStatus | None]]) -> None:
    reported = Reported()
    last: dict[str, pb.WorkerStatus] = {}
    for number, status in events:
        worker_id = f"w{number}"
        if status is None:
            reported.drop(worker_id)
            last.pop(worker_id, None)
        else:
            reported.put(worker_id, status)
            last[worker_id] = status
        assert reported.waiting_tokens == sum(said.queued_tokens - said.batch_queued_tokens for said in last.values())
        assert reported.max_model_len == min((s.max_model_len for s in last.values() if s.max_model_len), default=None)
        decoding = [said for said in last.values() if said.role == pb.WORKER_ROLE_DECODE]
        num_streams = sum(said.running for said in decoding)
        share = sum(said.running * said.prompt_share for said in decoding) / num_streams if num_streams else 0.0
        assert reported.prompt_share == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(("said", "counted"), [(-1.0, 0.0), (7.0, 1.0)])
def test_a_share_that_cannot_be_counts_as_the_nearest_that_can(said: float, counted: float) -> None:
    reported = Reported()
    reported.put("d", pb.WorkerStatus(role=pb.WORKER_ROLE_DECODE, running=2, prompt_share=said))
    assert reported.prompt_share == counted
