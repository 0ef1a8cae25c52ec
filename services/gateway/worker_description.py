"""A worker as ``GET /v1/workers`` shows it."""

from __future__ import annotations

from baton.api.common.v1 import common_pb2 as pb
from baton.services.gateway.layouts import wire_versions
from baton.services.gateway.worker_link import WorkerLink
from baton.services.runtime.convert import STATE_NAMES


def describe_worker(status: pb.WorkerStatus, link: WorkerLink) -> dict[str, object]:
    """``status``: its last report."""
    blocks = status.kv_blocks
    return {
        "id": link.worker_id,
        "role": link.role.value,
        "incarnation": link.incarnation,
        "pid": status.pid,
        "state": STATE_NAMES.get(status.state, "unknown") if link.is_connected else "unreachable",
        "problem": status.problem or None,
        "address": link.address,
        "model": status.model,
        "queued": status.queued,
        "running": status.running,
        "kv_blocks": {
            "total": blocks.total,
            "free": blocks.free,
            "cached": blocks.cached,
            "request": blocks.request,
            "transfer": blocks.transfer,
            "quarantine": blocks.quarantine,
        },
        "sessions": status.sessions,
        "retained_bytes": status.retained_bytes,
        "retained_bytes_budget": status.retained_bytes_budget,
        "overdue": status.overdue,
        "ledger_error": status.ledger_error,
        "fenced_total": status.fenced_total,
        "corrupt_blocks_total": status.corrupt_blocks_total,
        "preemptions_total": status.preemptions_total,
        "wire_versions": str(wire_versions(status.compatibility)),
        "fingerprint": status.compatibility.model_fingerprint,
        "kv_dtype": status.compatibility.layout.dtype,
        "block_size": status.compatibility.layout.block_size,
        "max_model_len": status.max_model_len,
    }
