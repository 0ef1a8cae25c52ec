"""The catalogue of bad inputs and requirements names tests that exist; and what no other test shows."""

from __future__ import annotations

import hmac

import pytest
from helpers.references import assert_exists
from helpers.requirements_catalogue import BAD_INPUTS, NOT_BUILT, REQUIREMENTS

from baton.services.core.errors import BatonError
from baton.services.gateway.auth import Authenticator


@pytest.mark.parametrize("name", [*BAD_INPUTS, *REQUIREMENTS])
def test_the_tests_that_are_named_exist(name: str) -> None:
    for reference in (BAD_INPUTS | REQUIREMENTS)[name]:
        assert_exists(reference)


def test_every_bad_input_of_clients_is_shown_or_named_as_not_built() -> None:
    numbers = {name.split()[0] for name in (*BAD_INPUTS, *NOT_BUILT) if name.startswith("X")}
    assert numbers == {f"X{number:02}" for number in range(1, 21)}


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every key there is, whichever fits, and only as digests of one length."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def watched(first: bytes, second: bytes) -> bool:
        compared.append((first, second))
        return real(first, second)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    keys = ["first-key", "second-key", "third-key"]
    authenticator = Authenticator(keys)
    for presented in (*keys, "another", "x" * 10_000):
        compared.clear()
        try:
            authenticator.tenant(f"Bearer {presented}")
        except BatonError:
            assert presented not in keys
        assert len(compared) == len(keys)
        assert {len(digest) for pair in compared for digest in pair} == {32}
