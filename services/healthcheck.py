"""Asks the Baton process of this container whether it is alive; the images' HEALTHCHECK.

    python -m baton.services.healthcheck http|grpc [SERVICE]

The port is BATON_PORT, the certificates are those of the process's own variables. Kubernetes needs this for workers with TLS
alone: its kubelet sends the other probes itself.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from pathlib import Path
from typing import Any

_TIMEOUT_S = 4.0
_WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  compared, not bound


def check_http(host: str, port: int) -> str | None:
    """What is wrong with a gateway, or None."""
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    if os.environ.get("BATON_SSL_CERTFILE"):
        # Like a kubelet's: it asks its own container, and nothing secret is said.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {error}"
    finally:
        connection.close()
    return None if status == http.client.OK else f"GET /health: {status}"


def check_grpc(host: str, port: int, service: str = "") -> str | None:
    """What is wrong with a worker, or None. ``service``: "ready" asks whether it takes new work."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with _channel(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return f"no answer: {error.code().name}"
    serving = health_pb2.HealthCheckResponse.SERVING
    return None if answer.status == serving else f"status {answer.status}"


def _channel(address: str) -> Any:
    """With the worker's own certificate, which is good for asking it as well."""
    import grpc

    files = [os.environ.get(f"BATON_TLS_{name}_FILE", "") for name in ("CA", "KEY", "CERT")]
    if not all(files):
        return grpc.insecure_channel(address)
    credentials = grpc.ssl_channel_credentials(*(Path(file).read_bytes() for file in files))
    return grpc.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", "baton-worker")])


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 alive, 1 not, 2 for a wrong call."""
    port = os.environ.get("BATON_PORT", "")
    kind, services = arguments[:1], arguments[1:]
    if kind not in (["http"], ["grpc"]) or len(services) > (kind == ["grpc"]) or not port.isdecimal():
        sys.stderr.write("usage: BATON_PORT=... python -m baton.services.healthcheck http|grpc [SERVICE]\n")
        return 2
    host = os.environ.get("BATON_HOST", "")
    address = (_WILDCARDS.get(host, host), int(port))
    problem = check_http(*address) if kind == ["http"] else check_grpc(*address, *services)
    if problem:
        sys.stderr.write(f"{problem}\n")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
