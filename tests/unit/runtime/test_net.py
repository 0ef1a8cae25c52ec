"""Listeners: a port that cannot be had is one line naming it."""

from __future__ import annotations

import pytest

from baton.services.core.errors import ConfigurationError
from baton.services.runtime.net import bind_listener, format_address, free_port, port_problem


def test_ipv6_hosts_are_bracketed() -> None:
    assert format_address("::1", 80) == "[::1]:80"
    assert format_address("localhost", 80) == "localhost:80"


def test_a_taken_port_is_named_and_a_free_one_is_no_problem() -> None:
    with bind_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}: the port is in use"):
            bind_listener("127.0.0.1", port)
        assert (
            port_problem("127.0.0.1", port, "--port")
            == f"--port: cannot listen on 127.0.0.1:{port}: the port is in use"
        )
    assert port_problem("127.0.0.1", port, "--port") is None
    assert port_problem("127.0.0.1", free_port("127.0.0.1"), "--port") is None


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.7"])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot listen on {host}:0: "):
        bind_listener(host, 0)
