"""Fixtures of the gateway's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from helpers.gateway_api import Gateway, make_gateway


@pytest.fixture
def gateway() -> Gateway:
    """The API over a scripted dispatcher."""
    return make_gateway()


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    """A client of ``gateway``, without sockets."""
    async with gateway.client() as client:
        yield client
