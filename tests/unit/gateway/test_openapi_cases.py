"""Requests drawn from the OpenAPI page itself: none of them is an error of the server, and every answer is a documented one.

``make fuzz-api EXAMPLES=1000`` draws others, and more.
"""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import pytest
from helpers.gateway_api import Gateway, chat_body, make_gateway

from baton.services.gateway.app import create_app

EXAMPLES = int(os.environ.get("BATON_API_EXAMPLES", "0"))


def operations() -> list[tuple[str, str]]:
    page = create_app(make_gateway().deps).openapi()
    return sorted((path, method) for path, methods in page["paths"].items() for method in methods)


@pytest.mark.parametrize(("path", "method"), operations(), ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the tool's own
async def test_no_request_is_an_error_of_the_server(gateway: Gateway, path: str, method: str) -> None:
    import schemathesis
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    app = create_app(gateway.deps)
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]
    checks = [schemathesis.checks.not_a_server_error, status_code_conformance, response_schema_conformance]
    num_seen = 0

    @hypothesis.given(case=operation.as_strategy())
    @hypothesis.settings(
        max_examples=EXAMPLES or 6,
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    def check(case: Any) -> None:
        nonlocal num_seen
        num_seen += 1
        response = case.call()
        if response.headers.get("content-type", [""])[0].startswith("application/json"):
            case.validate_response(response, checks=checks)
        else:
            assert response.status_code < 500

    check()
    assert num_seen > 0
    async with gateway.client() as client:
        assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 200
