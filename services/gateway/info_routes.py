"""The routes that tell: models, workers, receipts, health, metrics, version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.anthropic_answer import MessagesAnswer
from baton.services.gateway.boundary import MAX_REQUEST_ID_CHARS
from baton.services.gateway.chat import ChatAnswer
from baton.services.gateway.completions import CompletionAnswer
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.errors import PublicError
from baton.services.gateway.responses_answer import ResponsesAnswer

_ID_PREFIXES = tuple(kind.id_prefix for kind in (ChatAnswer, CompletionAnswer, ResponsesAnswer, MessagesAnswer))


def info_router(deps: GatewayDeps) -> APIRouter:
    """Everything that only reads."""
    router = APIRouter()

    @router.get("/")
    async def index() -> Response:
        """What this is and where to look."""
        is_ready, reason = deps.ready()
        paths = ("/v1/models", "/v1/workers", "/health", "/ready", "/metrics", "/version", "/openapi.json")
        fields = {"name": "baton", "version": version("baton-llm"), "model": deps.model.name, "ready": is_ready}
        return _json(fields | {"reason": reason or None, "paths": paths})

    @router.get("/v1/models")
    async def list_models() -> Response:
        """Every name that can be asked for."""
        return _json({"object": "list", "data": [_model(deps, name) for name in deps.model.names]})

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        """One of them."""
        return _json(_model(deps, deps.model.resolve(name)))

    @router.get("/v1/workers")
    async def list_workers() -> Response:
        """The workers that the gateway knows."""
        return _json({"object": "list", "data": deps.workers()})

    @router.get("/v1/requests/{request_id:path}")
    async def get_receipt(request: Request, request_id: str) -> Response:
        """The receipt of a request, by response id or x-request-id. Of another tenant's there is none."""
        whose = request.state.whose
        receipt = deps.receipt(request_id, whose)
        for prefix in _ID_PREFIXES:
            if receipt is None and request_id.startswith(prefix):
                receipt = deps.receipt(request_id.removeprefix(prefix), whose)
        if receipt is None:
            shown = request_id[:MAX_REQUEST_ID_CHARS]
            raise BatonError(ErrorCode.NOT_FOUND, f"There is no receipt for {shown!r}.", param="request_id")
        return _json(receipt)

    @router.get("/health")
    @router.get("/ping", include_in_schema=False)
    async def health() -> Response:
        """The process is alive."""
        return _json({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """Whether requests can be served: why not, or, where a pool is missing, what is lost."""
        is_ready, reason = deps.ready()
        if is_ready:
            return _json({"status": "ready"} | ({"reason": reason} if reason else {}))
        return PublicError(503, "server_error", reason, None, "not_ready", 1.0).response()

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(deps.metrics(), headers={"content-type": CONTENT_TYPE_LATEST})

    @router.get("/version")
    async def get_version() -> Response:
        """The release."""
        return _json({"version": version("baton-llm")})

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        """The REST API as OpenAPI."""
        return _json(request.app.openapi())

    return router


def _model(deps: GatewayDeps, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": deps.model.created,
        "owned_by": "baton",
        "root": deps.model.name,
        "parent": None,
        "max_model_len": deps.model.max_model_len,
    }


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
