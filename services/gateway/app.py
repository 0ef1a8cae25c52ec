"""The REST API, put together."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.auth import Authenticator
from baton.services.gateway.boundary import Boundary
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.errors import HttpRefusal, public_error
from baton.services.gateway.generation_routes import generation_router
from baton.services.gateway.info_routes import info_router
from baton.services.gateway.openapi import ERROR_RESPONSES
from baton.services.gateway.session_routes import session_router
from baton.services.gateway.sse import ClientGoneError
from baton.services.gateway.text_routes import text_router
from baton.services.gateway.worker_routes import worker_router

_MAX_PATH_CHARS_SHOWN = 100


def create_app(deps: GatewayDeps, *, with_operators: bool = True) -> FastAPI:
    """The public listener. ``Boundary`` lets nothing through to it without a key, where keys are set, but ``OPEN_PATHS``.

    ``with_operators``: their routes are here too, for whoever may use them. Not where other machines reach the port.
    """
    app = _new_app("Baton", "Disaggregated LLM serving, OpenAI-compatible.")
    app.include_router(generation_router(deps))
    app.include_router(text_router(deps))
    app.include_router(info_router(deps))
    app.include_router(session_router(deps))
    if with_operators:
        app.include_router(worker_router(deps))
    app.add_middleware(Boundary, deps=deps)
    return app


def create_admin_app(deps: GatewayDeps, operators: Authenticator) -> FastAPI:
    """The admin listener: everything that tells, and everything that changes the installation. It generates nothing."""
    app = _new_app("Baton, for operators", "What runs here, and what can be done to it.")
    app.include_router(info_router(deps))
    app.include_router(worker_router(deps))
    app.add_middleware(Boundary, deps=deps, operators=operators)
    return app


def _new_app(title: str, description: str) -> FastAPI:
    app = FastAPI(
        title=title,
        description=description,
        responses=dict(ERROR_RESPONSES),
        openapi_url=None,  # its route and the pages on it would be open; ours is a route like the others
    )
    app.add_exception_handler(BatonError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid_route_parameter)
    app.add_exception_handler(ClientGoneError, _on_client_gone)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    return public_error(error).response(request.scope["path"])


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:_MAX_PATH_CHARS_SHOWN]
    if error.status_code == 404:
        message = f"There is nothing at {path!r}."
        return public_error(BatonError(ErrorCode.NOT_FOUND, message)).response(path)
    if error.status_code == 405:
        refusal = HttpRefusal(405, "method_not_allowed", f"{path!r} does not take {request.method}.")
        response = public_error(refusal).response(path)
        response.headers.update(error.headers or {})  # Allow
        return response
    return public_error(HttpRefusal(error.status_code, "http_error", "The request was refused.")).response()


async def _on_invalid_route_parameter(request: Request, error: Exception) -> Response:
    return public_error(BatonError(ErrorCode.INVALID_REQUEST, "a parameter in the path is not valid")).response()


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # read by nobody but an access log
