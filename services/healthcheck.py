"""Asks the Baton process of this container whether it is alive; the images' HEALTHCHECK.

    python -m baton.services.healthcheck http|grpc

The port is BATON_PORT. Kubernetes needs none of this: its kubelet sends the probes itself.
"""

from __future__ import annotations

import http.client
import os
import sys

_TIMEOUT_S = 4.0
_WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  compared, not bound


def check_http(host: str, port: int) -> str | None:
    """What is wrong with a gateway, or None."""
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {error}"
    finally:
        connection.close()
    return None if status == http.client.OK else f"GET /health: {status}"


def check_grpc(host: str, port: int) -> str | None:
    """What is wrong with a worker, or None."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return f"no answer: {error.code().name}"
    serving = health_pb2.HealthCheckResponse.SERVING
    return None if answer.status == serving else f"status {answer.status}"


_CHECKS = {"http": check_http, "grpc": check_grpc}


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 alive, 1 not, 2 for a wrong call."""
    port = os.environ.get("BATON_PORT", "")
    if len(arguments) != 1 or arguments[0] not in _CHECKS or not port.isdecimal():
        sys.stderr.write("usage: BATON_PORT=... python -m baton.services.healthcheck http|grpc\n")
        return 2
    host = os.environ.get("BATON_HOST", "")
    problem = _CHECKS[arguments[0]](_WILDCARDS.get(host, host), int(port))
    if problem:
        sys.stderr.write(f"{problem}\n")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
