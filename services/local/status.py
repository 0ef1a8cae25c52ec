"""``baton status``: the workers of a running gateway as a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from baton.services.local.gateway_client import GatewayClient, GatewayUnreachable
from baton.services.runtime.settings_loader import EXIT_BAD_CONFIGURATION

_BLOCK_STATES = ("free", "cached", "request", "transfer", "quarantine")


def show_status(url: str, api_key: str | None) -> int:
    """Prints the table and returns 0; 1 with words when the gateway does not answer."""
    try:
        answer = GatewayClient.from_url(url, api_key=api_key).get("/v1/workers")
    except ValueError as error:
        sys.stderr.write(f"baton status: --url: {error}\n")
        return EXIT_BAD_CONFIGURATION
    except GatewayUnreachable as error:
        sys.stderr.write(f"baton status: no gateway answers at {url}: {error}\n")
        return 1
    if answer.status != 200:
        message = (answer.body or {}).get("error", {}).get("message", "")
        sys.stderr.write(f"baton status: {url} answered {answer.status}: {message}\n")
        return 1
    Console().print(workers_table(answer.body["data"]))
    return 0


def workers_table(workers: Sequence[dict[str, Any]]) -> Table:
    """One row per worker, its KV blocks by state."""
    table = Table()
    for heading in ("worker", "role", "state", "address", "pid"):
        table.add_column(heading)
    for heading in ("queued", "running", "KV blocks", *_BLOCK_STATES, "overdue"):
        table.add_column(heading, justify="right")
    for worker in workers:
        blocks = worker["kv_blocks"]
        numbers = (
            worker["queued"],
            worker["running"],
            blocks["total"],
            *(blocks[state] for state in _BLOCK_STATES),
            worker["overdue"],
        )
        names = (worker["id"], worker["role"], worker["state"], worker["address"], worker["pid"])
        table.add_row(*(str(name) for name in names), *(f"{number:,}" for number in numbers))
    return table
