"""Two live workers with one id: the one that began later serves. Workers and gateways decide alike."""

from __future__ import annotations

from baton.api.common.v1 import common_pb2 as pb


def is_replaced_by(one: pb.WorkerStatus, other: pb.WorkerStatus) -> bool:
    """``other`` is another process with the same id, and the one that serves.

    A worker that does not say when it began is taken as replaced: of such, the last one heard of serves.
    """
    if one.identity.worker_id != other.identity.worker_id or one.identity.incarnation == other.identity.incarnation:
        return False
    if not one.started_ms or not other.started_ms:
        return True
    return (other.started_ms, other.identity.incarnation) > (one.started_ms, one.identity.incarnation)
