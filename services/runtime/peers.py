"""Who may ask what of whom, once processes show certificates. Whatever is not listed here is refused."""

from __future__ import annotations

from collections.abc import Mapping

from baton.services.runtime.certificates import Peer

# Workers are dialled by addresses that no certificate can know; this is the name that theirs carry.
WORKER_NAME = "baton-worker"

GATEWAY, WORKER, PLANNER = "gateway", "worker", "planner"
_ANY_ROLE = frozenset({GATEWAY, WORKER, PLANNER})
# The standard services are for probes and people as well: any certificate of the CA will do.
ANYBODY: frozenset[str] = frozenset()

_GATEWAY = frozenset({GATEWAY})
_WORKER = frozenset({WORKER})
_PREFILL, _DECODE = "/baton.api.prefill.v1.PrefillService", "/baton.api.decode.v1.DecodeService"
_KV, _LEDGER = "/baton.api.kvtransfer.v1.KVTransferService", "/baton.api.worker.v1.WorkerService"

ALLOWED: Mapping[str, frozenset[str]] = {
    **{f"{service}/Open": _GATEWAY for service in (_PREFILL, _DECODE)},
    **{f"{service}/Drain": _GATEWAY for service in (_PREFILL, _DECODE)},
    **{f"{service}/GetStatus": frozenset({GATEWAY, PLANNER}) for service in (_PREFILL, _DECODE)},
    **{f"{_KV}/{method}": _WORKER for method in ("Handshake", "Reserve", "Commit", "Abort", "Heartbeat", "Fetch")},
    f"{_KV}/Probe": _GATEWAY,
    **{f"{_LEDGER}/{method}": _GATEWAY for method in ("GetBlocks", "GetSession", "CloseSession")},
    f"{_LEDGER}/ChangeRole": frozenset({GATEWAY, PLANNER}),
    # On loopback alone, and only where a process was started for it.
    "/baton.api.worker.v1.FailpointService/SetFailpoints": _ANY_ROLE,
    "/grpc.health.v1.Health/Check": ANYBODY,
    "/grpc.health.v1.Health/Watch": ANYBODY,
    "/grpc.health.v1.Health/List": ANYBODY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY_ROLE,
}
"""Method -> roles that may call it."""


def refusal(peer: Peer, trust_domain: str, allowed: frozenset[str]) -> str | None:
    """Why this peer may not; None: it may."""
    if peer.trust_domain == trust_domain and peer.roles & allowed:
        return None
    return f"the certificate shown is that of {peer}; this needs a {' or '.join(sorted(allowed))} of {trust_domain}"
