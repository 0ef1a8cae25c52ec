"""The routes of conversations: what is kept of one, and that it is over."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Request, Response

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.sessions import session_key
from baton.services.gateway.validation import MAX_SESSION_ID_CHARS


def session_router(deps: GatewayDeps) -> APIRouter:
    """A tenant sees and ends its own conversations only."""
    router = APIRouter()

    @router.get("/v1/sessions/{session_id:path}")
    async def get_session(request: Request, session_id: str) -> Response:
        """What workers keep of a conversation, and for how long at most."""
        kept = await deps.sessions.get(_key(request, session_id))
        if not kept:
            raise _unknown(session_id)
        fields = {
            "id": session_id,
            "object": "session",
            "blocks": sum(one.num_blocks for one in kept),
            "bytes": sum(one.num_bytes for one in kept),
            "expires_in_s": round(max(one.expires_in_s for one in kept), 3),
            "workers": [
                {
                    "id": one.worker_id,
                    "blocks": one.num_blocks,
                    "bytes": one.num_bytes,
                    "expires_in_s": round(one.expires_in_s, 3),
                }
                for one in kept
            ],
        }
        return Response(orjson.dumps(fields), media_type="application/json")

    @router.delete("/v1/sessions/{session_id:path}", status_code=204)
    async def close_session(request: Request, session_id: str) -> Response:
        """The conversation is over: what only it kept makes room first."""
        if not await deps.sessions.close(_key(request, session_id)):
            raise _unknown(session_id)
        return Response(status_code=204)

    return router


def _key(request: Request, session_id: str) -> str:
    if not 1 <= len(session_id) <= MAX_SESSION_ID_CHARS:
        raise _unknown(session_id)
    return session_key(request.state.tenant, session_id)


def _unknown(session_id: str) -> BatonError:
    return BatonError(ErrorCode.NOT_FOUND, f"There is no session {session_id[:64]!r}.", param="session_id")
