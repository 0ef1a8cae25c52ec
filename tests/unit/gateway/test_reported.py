"""Sums over reports are what adding them up anew would give."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.api.common.v1 import common_pb2 as pb
from baton.services.gateway.reported import Reported

REPORTS = st.tuples(st.integers(0, 3), st.integers(0, 900), st.integers(0, 90), st.sampled_from([0, 512, 4096, 8192]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(REPORTS, st.booleans()), max_size=40))
def test_they_follow_every_report_and_every_loss(events: list[tuple[tuple[int, int, int, int], bool]]) -> None:
    reported = Reported()
    last: dict[str, tuple[int, int]] = {}
    for (number, queued, batch_queued, length), is_lost in events:
        worker_id = f"w{number}"
        if is_lost:
            reported.drop(worker_id)
            last.pop(worker_id, None)
        else:
            status = pb.WorkerStatus(
                queued_tokens=queued + batch_queued, batch_queued_tokens=batch_queued, max_model_len=length
            )
            reported.put(worker_id, status)
            last[worker_id] = queued, length
        assert reported.waiting_tokens == sum(queued for queued, _ in last.values())
        assert reported.max_model_len == min((length for _, length in last.values() if length), default=None)
