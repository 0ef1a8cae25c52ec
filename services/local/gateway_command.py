"""What the commands beside a gateway share: asking it, and saying in one line why it could not be asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from baton.services.local.gateway_client import Answer, GatewayClient, GatewayUnreachable
from baton.services.runtime.certificates import CertificateProblem
from baton.services.runtime.settings_loader import EXIT_BAD_CONFIGURATION


class Refused(Exception):
    """The gateway said no."""


def with_gateway(
    command: str, url: str, api_key: str | None, use: Callable[[GatewayClient], int | None], *, timeout_s: float = 10.0
) -> int:
    """What ``use`` returns, or 0; 1 with words where there is no gateway or it refuses; 2 for a bad URL."""
    try:
        return use(GatewayClient.from_url(url, api_key=api_key, timeout_s=timeout_s)) or 0
    except CertificateProblem as error:
        sys.stderr.write(f"baton {command}: {error}\n")
        return EXIT_BAD_CONFIGURATION
    except ValueError as error:
        sys.stderr.write(f"baton {command}: --url: {error}\n")
        return EXIT_BAD_CONFIGURATION
    except GatewayUnreachable as error:
        sys.stderr.write(f"baton {command}: no gateway answers at {url}: {error}\n")
        return 1
    except Refused as error:
        sys.stderr.write(f"baton {command}: {url} {error}\n")
        return 1


def checked(answer: Answer) -> Any:
    """The body of a 200. Raises Refused for anything else."""
    if answer.status != 200:
        raise Refused(f"answered {answer.status}: {refusal(answer.body)}")
    return answer.body


def refusal(body: Any) -> str:
    """The message of an error body."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""
