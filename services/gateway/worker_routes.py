"""The routes for operators: what the installation does and why, one worker's blocks, to drain it, to change its role."""

from __future__ import annotations

from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.router import Role
from baton.services.gateway.deps import GatewayDeps

_MAX_BLOCKS = 10_000


def worker_router(deps: GatewayDeps) -> APIRouter:
    """Where keys are set, a tenant's own is not enough."""
    router = APIRouter(dependencies=[Depends(_operators_only)])

    @router.get("/v1/decisions")
    async def list_decisions() -> Response:
        """Whether handing over pays, by prompt length: the threshold of now, workers' learned costs, decisions compared."""
        return Response(orjson.dumps(deps.decisions()), media_type="application/json")

    @router.get("/v1/workers/{worker_id}/blocks")
    async def list_blocks(
        worker_id: str,
        overdue: bool = False,
        cached: bool = False,
        first: Annotated[int, Query(ge=0, lt=2**31)] = 0,
        limit: Annotated[int, Query(ge=1, le=_MAX_BLOCKS)] = 1000,
    ) -> Response:
        """A page of the worker's block ledger: blocks that somebody holds; with ``cached`` also prefix cache."""
        page = await deps.operations.blocks(worker_id, overdue=overdue, cached=cached, first=first, limit=limit)
        return Response(orjson.dumps(page), media_type="application/json")

    @router.post("/v1/workers/{worker_id}/drain")
    async def drain(worker_id: str, timeout_s: Annotated[float, Query(gt=0, le=3600)] = 30.0) -> Response:
        """Takes the worker out of use; answers when it holds nothing any more, or has given up what was left."""
        answer = await deps.operations.drain(worker_id, timeout_s)
        return Response(orjson.dumps(answer), media_type="application/json")

    @router.post("/v1/workers/{worker_id}/role")
    async def change_role(
        worker_id: str,
        role: Annotated[Literal["prefill", "decode"], Query()],
        timeout_s: Annotated[float, Query(gt=0, le=3600)] = 30.0,
    ) -> Response:
        """Makes a prefill worker a decode worker or the other way round; answers when it serves in its new role.

        What it runs is finished before, or goes on elsewhere when ``timeout_s`` is over.
        """
        answer = await deps.operations.change_role(worker_id, Role(role), timeout_s)
        return Response(orjson.dumps(answer), media_type="application/json")

    return router


async def _operators_only(request: Request) -> None:
    if not request.state.may_operate:
        message = (
            "This API key may not do that. It takes the key of a tenant with `admin: true` in the tenants file, or the "
            "admin listener (--admin-port)."
        )
        raise BatonError(ErrorCode.FORBIDDEN, message)
    # Any page that a browser shows may send a form to loopback, where no key is needed. It cannot leave this header out.
    if request.method == "POST" and "origin" in request.headers:
        raise BatonError(ErrorCode.FORBIDDEN, "This may not be asked for by a web page.")
