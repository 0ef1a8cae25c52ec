"""``baton blocks``, ``drain`` and ``role``: what workers' ledgers show, taking a worker out of use, and giving it another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from baton.services.local.admin_door import find_admin_door
from baton.services.local.gateway_client import GatewayClient
from baton.services.local.gateway_command import checked, with_gateway

_PAGE = 1000
# Beyond what the worker has to drain: for the gateway's own answer.
_ANSWER_S = 30.0


def show_blocks(url: str, api_key: str | None, *, worker_id: str | None, overdue: bool, cached: bool) -> int:
    """Prints the ledger of one worker, or of all, and returns 0; 1 with words when it cannot be had."""

    def show(client: GatewayClient) -> None:
        rows = client_rows(client, worker_id, overdue=overdue, cached=cached)
        Console().print(blocks_table(rows))
        what = "overdue" if overdue else "held"
        print(f"{len(rows)} block(s) {what if not cached else 'held or cached'}")

    return _with_operators("blocks", url, api_key, show)


def drain_worker(url: str, api_key: str | None, worker_id: str, timeout_s: float) -> int:
    """Returns 0 when the worker holds nothing any more."""

    def drain(client: GatewayClient) -> None:
        path = f"/v1/workers/{quote(worker_id, safe='')}/drain?timeout_s={timeout_s}"
        answer = checked(client.post(path, None))
        left = answer["given_up"]
        print(f"{worker_id} is drained" + (f"; {left} request(s) were handed back to go on elsewhere" if left else ""))

    return _with_operators("drain", url, api_key, drain, timeout_s=timeout_s + _ANSWER_S)


def change_role(url: str, api_key: str | None, worker_id: str, role: str, timeout_s: float) -> int:
    """Returns 0 when the worker serves in that role."""

    def change(client: GatewayClient) -> None:
        path = f"/v1/workers/{quote(worker_id, safe='')}/role?role={role}&timeout_s={timeout_s}"
        answer = checked(client.post(path, None))
        word = "already" if answer["state"] == "unchanged" else "now"
        print(f"{worker_id} is {word} a {role} worker")

    return _with_operators("role", url, api_key, change, timeout_s=timeout_s + _ANSWER_S)


def _with_operators(
    command: str, url: str, api_key: str | None, use: Callable[[GatewayClient], None], *, timeout_s: float = 10.0
) -> int:
    """Asks the admin listener of this user's own installation, where ``url`` names one: it needs no key from the user."""
    door = find_admin_door(url)
    if door is not None:
        url, api_key = door.url, door.key
    return with_gateway(command, url, api_key, use, timeout_s=timeout_s)


def client_rows(client: GatewayClient, worker_id: str | None, *, overdue: bool, cached: bool) -> list[dict[str, Any]]:
    """All pages of the ledger, each row with its worker."""
    if worker_id is None:
        workers = [str(row["id"]) for row in checked(client.get("/v1/workers"))["data"]]
    else:
        workers = [worker_id]
    query = f"overdue={str(overdue).lower()}&cached={str(cached).lower()}&limit={_PAGE}"
    return [row for worker in workers for row in _pages(client, worker, query)]


def blocks_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row per block."""
    table = Table()
    for heading in ("worker", "block", "state", "request", "peer", "phase"):
        table.add_column(heading, justify="right" if heading == "block" else "left")
    for heading in ("age", "deadline", "gen"):
        table.add_column(heading, justify="right")
    for row in rows:
        request = f"{row['request_id']}/{row['attempt']}" if row["attempt"] else row["request_id"] or ""
        deadline = _seconds(row["deadline_in_s"])
        table.add_row(
            row["worker"],
            str(row["block_id"]),
            row["state"],
            request,
            row["peer"] or "",
            row["phase"] or "",
            _seconds(row["age_s"]),
            f"[red]{deadline} overdue[/red]" if row["overdue"] else deadline,
            str(row["generation"]),
        )
    return table


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{abs(value):.1f} s"


def _pages(client: GatewayClient, worker_id: str, query: str) -> Iterator[dict[str, Any]]:
    first: int | None = 0
    while first is not None:
        page = checked(client.get(f"/v1/workers/{quote(worker_id, safe='')}/blocks?{query}&first={first}"))
        for row in page["data"]:
            yield {"worker": worker_id, **row}
        first = page["next"]
