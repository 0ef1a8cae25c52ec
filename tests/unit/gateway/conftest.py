"""Fixtures of the gateway's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, MutableMapping
from typing import Any

import httpx
import pytest
import structlog
from helpers.gateway_api import Gateway, make_gateway


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """The API over a scripted dispatcher."""
    gateway = make_gateway()
    yield gateway
    gateway.deps.grammars.close()


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    """A client of ``gateway``, without sockets."""
    async with gateway.client() as client:
        yield client


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """What was logged, instead of printing it."""
    with structlog.testing.capture_logs() as entries:
        yield entries
