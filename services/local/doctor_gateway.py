"""What ``baton doctor`` asks a running gateway: is it ready, do its pairs work, is anything held too long, do clocks agree."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

from baton.services.local.doctor import Finding, Level, Questions
from baton.services.local.gateway_client import Answer, GatewayClient, GatewayUnreachable
from baton.services.local.gateway_command import refusal

# The header has whole seconds; more than this is no rounding.
_MAX_CLOCK_SKEW_S = 3.0


def check_gateway(questions: Questions) -> Iterator[Finding]:
    """One finding where none runs."""
    try:
        client = GatewayClient.from_url(questions.url, api_key=questions.api_key, timeout_s=5.0)
    except ValueError as error:
        yield Finding("gateway", Level.FAIL, f"--url: {error}", "for example http://127.0.0.1:8000")
        return
    try:
        ready = client.get("/ready")
    except GatewayUnreachable:
        yield Finding("gateway", Level.OK, f"none runs at {questions.url}")
        return
    yield from _check_clock(ready)
    if ready.status != 200:
        mend = "wait while it starts; baton status and the workers' logs say more"
        yield Finding("gateway", Level.FAIL, f"{questions.url} is not ready: {refusal(ready.body)}", mend)
    elif reason := (ready.body or {}).get("reason"):
        yield Finding("gateway", Level.WARN, f"ready, but {reason}", "baton status shows which worker is missing")
    else:
        yield Finding("gateway", Level.OK, f"{questions.url} is ready")
    workers = client.get("/v1/workers")
    if workers.status != 200:
        found = f"the list of workers was answered {workers.status}: {refusal(workers.body)}"
        yield Finding("workers", Level.WARN, found, "give a key with --api-key")
        return
    for worker in workers.body["data"]:
        yield _worker(worker)
        for link in worker.get("links") or ():
            yield _link(worker["id"], link)


def _check_clock(answer: Answer) -> Iterator[Finding]:
    date = answer.headers.get("date")
    if date is None:
        return
    skew_s = parsedate_to_datetime(date).timestamp() - time.time()
    if abs(skew_s) > _MAX_CLOCK_SKEW_S:
        found = f"the gateway's is {abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}"
        yield Finding("clocks", Level.WARN, found, "synchronize them (NTP), or logs cannot be read side by side")
    else:
        yield Finding("clocks", Level.OK, "the gateway's agrees with this machine's")


def _worker(worker: dict[str, Any]) -> Finding:
    what = f"worker {worker['id']}"
    if worker["ledger_error"]:
        return Finding(what, Level.FAIL, "its block ledger contradicts itself", "a bug: keep its log, and restart it")
    if worker["overdue"]:
        mend = f"baton blocks --overdue --worker {worker['id']} names them"
        return Finding(what, Level.WARN, f"{worker['overdue']} block(s) are held past their deadline", mend)
    if worker["state"] != "ready":
        found = f"{worker['state']}{': ' + worker['problem'] if worker['problem'] else ''}"
        return Finding(what, Level.WARN, found, "it takes nothing new")
    return Finding(what, Level.OK, f"{worker['role']}, ready at {worker['address']}")


def _link(prefill: str, link: dict[str, Any]) -> Finding:
    what = f"link {prefill} -> {link['decode']}"
    if link["breaker"] != "closed" or link["state"] not in ("verified", "unverified"):
        found = f"{link['state']}, breaker {link['breaker']}: {link['reason'] or 'no canary has come through yet'}"
        mend = "requests go around it; check the route and the ports between the two workers"
        return Finding(what, Level.WARN, found, mend)
    if link["failed_transports"]:
        found = f"over {link['transport']}, since {', '.join(map(str, link['failed_transports']))} did not work"
        return Finding(what, Level.WARN, found, "the workers' logs say why (kv_transport_failed)")
    return Finding(what, Level.OK, f"{link['state']} over {link['transport'] or 'any transport'}")
