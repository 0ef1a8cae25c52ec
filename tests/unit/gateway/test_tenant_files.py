"""Files with API keys: what is accepted, what is said of what is not, and that a change is noticed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.waiting import eventually

from baton.services.core.errors import ConfigurationError
from baton.services.core.tenants import TenantLimits
from baton.services.gateway.auth import Authenticator
from baton.services.gateway.tenant_files import TenantFiles, hashed, key_digest, read_tenants, ring_of_keys


def write(path: Path, *tenants: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"tenants": list(tenants)}))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tenants.yaml"


def test_keys_of_one_tenant_share_its_limits_and_its_cache(path: Path) -> None:
    write(
        path,
        {
            "name": "one",
            "keys": [hashed("a"), hashed("b")],
            "weight": 2.5,
            "admin": True,
            "requests_per_minute": 60,
            "tokens_per_day": 9,
        },
        {"name": "two", "keys": [hashed("c")]},
    )
    authenticator = Authenticator(ring=read_tenants(path))
    one = authenticator.tenant("Bearer a")
    assert authenticator.tenant("Bearer b") == one
    assert (one.name, one.weight, one.is_admin) == ("one", 2.5, True)
    assert one.limits == TenantLimits(requests_per_minute=60, tokens_per_day=9)
    two = authenticator.tenant("Bearer c")
    assert (two.name, two.weight, two.limits, two.is_admin) == ("two", 1.0, TenantLimits(), False)
    assert one.tenant_id != two.tenant_id
    assert set(one.tenant_id + two.tenant_id) <= set("0123456789abcdef")


def test_a_tenant_keeps_its_cache_when_its_keys_change(path: Path) -> None:
    (before,) = read_tenants(write(path, {"name": "one", "keys": [hashed("old")]})).values()
    (after,) = read_tenants(write(path, {"name": "one", "keys": [hashed("new")], "weight": 3})).values()
    assert before.tenant_id == after.tenant_id


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "input should be"),
        ("tenants: [", "not YAML, line 1"),
        ("[]", "input should be"),
        ("tenants: []", "no tenant has a key"),
        ("tenants: [{name: one, keys: []}]", "no tenant has a key"),
        ("tenants: [{name: one}]", "tenants[0].keys: field required"),
        ("tenants: [{name: 'a b', keys: []}]", "tenants[0].name"),
        ("tenants: [{name: one, keys: [secret]}]", "keys[0] of tenant one must be sha256:"),
        ("tenants: [{name: one, keys: ['sha256:12']}]", "keys[0] of tenant one must be sha256:"),
        ("tenants: [{name: one, keys: [], weight: 0}]", "tenants[0].weight: input should be greater than 0"),
        ("tenants: [{name: one, keys: [], weight: .nan}]", "tenants[0].weight"),
        ("tenants: [{name: one, keys: [], requests_per_minute: 0}]", "tenants[0].requests_per_minute"),
        ("tenants: [{name: one, keys: [], requests_per_minute: '5'}]", "tenants[0].requests_per_minute"),
        ("tenants: [{name: one, keys: [], request_per_minute: 5}]", "tenants[0].request_per_minute: extra inputs"),
        ("tenants: [{name: one, keys: []}, {name: one, keys: []}]", "tenant one is there twice"),
        ("\xff\xfe", "not UTF-8"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(path: Path, text: str, words: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigurationError) as caught:
        read_tenants(path)
    assert words in caught.value.message
    assert str(path) in caught.value.message


def test_a_key_belongs_to_one_tenant_and_no_error_shows_it(path: Path) -> None:
    write(path, {"name": "one", "keys": [hashed("k")]}, {"name": "two", "keys": [hashed("k")]})
    with pytest.raises(ConfigurationError, match=r"keys\[0\] of tenant two belongs to one"):
        read_tenants(path)
    write(path, {"name": "one", "keys": ["my-secret-key"]})
    with pytest.raises(ConfigurationError) as caught:
        read_tenants(path)
    assert "my-secret" not in caught.value.message


def test_a_list_may_hold_hashed_keys() -> None:
    plain, hidden = ring_of_keys(["key"]), ring_of_keys([hashed("key")])
    assert plain == hidden
    assert list(plain) == [key_digest("key")]


def test_files_add_up_and_the_tenants_file_goes_first(tmp_path: Path, path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\n a \n\nb\n")
    write(path, {"name": "one", "keys": [hashed("a")]})
    ring = TenantFiles([keys], path).read()
    assert {ring[key_digest(key)].name for key in "ab"} == {"one", f"key-{key_digest('b').hex()[:8]}"}
    assert TenantFiles([], None).read() == {}


def test_a_list_without_a_key_lets_nobody_in_by_mistake(tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n")
    with pytest.raises(ConfigurationError, match="everybody could come in"):
        TenantFiles([empty], None).read()


async def test_changes_are_noticed_and_bad_ones_change_nothing(path: Path, logs: list[Any]) -> None:
    """A file that was replaced by a rename, as editors and Kubernetes do it, is seen as well."""
    write(path, {"name": "one", "keys": [hashed("old")]})
    files = TenantFiles([], path)
    authenticator = Authenticator(ring=files.read())
    watching = asyncio.create_task(files.watch(authenticator.replace, every_s=0.01))

    def is_known(key: str) -> bool:
        return key_digest(key) in authenticator._ring

    def refusals() -> list[Any]:
        return [line for line in logs if "cannot be used" in line["event"]]

    path.write_text("tenants: [")
    await eventually(lambda: len(refusals()) == 1, timeout_s=30)
    path.unlink()
    await eventually(lambda: len(refusals()) == 2, timeout_s=30)
    assert is_known("old")
    new = write(path.with_name("new"), {"name": "one", "keys": [hashed("new")]})
    new.rename(path)
    await eventually(lambda: is_known("new"), timeout_s=30)
    assert not is_known("old")
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
