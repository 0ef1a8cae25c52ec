"""Certificates that cannot be used are told at the start: all of them, with the cause and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.certificates import CLIENT_AUTH, SERVER_AUTH, Authority, Files

from baton.services.runtime.settings import GatewaySettings, ServeSettings, Settings, WorkerSettings
from baton.services.runtime.settings_loader import SettingsError, load_settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ca(folder: Path) -> Authority:
    return Authority(folder)


def problems_of(cls: type[Settings], options: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(cls, options)
    return list(caught.value.problems)


def test_a_worker_and_a_gateway_take_certificates_with_their_role(ca: Authority) -> None:
    worker = ca.issue("worker", "worker", usages=(CLIENT_AUTH, SERVER_AUTH))
    gateway = ca.issue("gateway", "gateway", usages=(CLIENT_AUTH,))
    both = ca.issue("both", "worker", "gateway")
    load_settings(WorkerSettings, {"role": "decode", **worker.options()})
    load_settings(GatewaySettings, gateway.options())
    load_settings(ServeSettings, both.options())


BAD: dict[str, tuple[Callable[[Authority, Path], dict[str, str]], str, str]] = {
    "missing": (lambda ca, folder: _with(ca, tls_cert_file="/no/such.crt"), "--tls-cert-file", "No such file"),
    "no PEM": (lambda ca, folder: _with(ca, tls_key_file=_file(folder, "x")), "--tls-key-file", "openssl pkey"),
    "mismatch": (
        lambda ca, folder: _with(ca, tls_key_file=str(ca.issue("other", "worker").key)),
        "--tls-cert-file",
        "not the one of the certificate",
    ),
    "expired": (
        lambda ca, folder: ca.issue("old", "worker", from_day=-3, to_day=-1).options(),
        "--tls-cert-file",
        "expired at 20",
    ),
    "early": (lambda ca, folder: ca.issue("new", "worker", from_day=1).options(), "--tls-cert-file", "clock"),
    "encrypted": (
        lambda ca, folder: ca.issue("locked", "worker", password=b"secret").options(),
        "--tls-key-file",
        "take the password off",
    ),
    "wrong CA": (
        lambda ca, folder: _with(ca, tls_ca_file=str(Authority(folder, "another CA").path)),
        "--tls-ca-file",
        "did not sign",
    ),
    "no CA": (
        lambda ca, folder: _with(ca, tls_ca_file=str(ca.issue("leaf", "worker").certificate)),
        "--tls-ca-file",
        "holds no CA",
    ),
    "wrong role": (
        lambda ca, folder: ca.issue("wrong", "gateway").options(),
        "--tls-cert-file",
        "spiffe://TRUST-DOMAIN/baton/worker",
    ),
    "no usage": (
        lambda ca, folder: ca.issue("half", "worker", usages=(SERVER_AUTH,)).options(),
        "--tls-ca-file",
        "clientAuth",
    ),
    "key alone": (
        lambda ca, folder: {"tls_key_file": str(ca.issue("alone", "worker").key)},
        "--tls-cert-file",
        "needed with --tls-key-file",
    ),
    "CA alone": (lambda ca, folder: {"tls_ca_file": str(ca.path)}, "--tls-ca-file", "needs --tls-cert-file"),
    "no CA named": (
        lambda ca, folder: {k: v for k, v in _with(ca).items() if k != "tls_ca_file"},
        "--tls-ca-file",
        "needed with --tls-cert-file",
    ),
    "nixl": (lambda ca, folder: _with(ca, transport="nixl"), "--transport", "--allow-unencrypted-kv"),
}


def _with(ca: Authority, **options: str) -> dict[str, str]:
    return {**ca.issue("good", "worker").options(), **options}


def _file(folder: Path, content: str) -> str:
    path = folder / "some-file"
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_problem_that_says_what_to_do(case: str, ca: Authority, folder: Path) -> None:
    make, option, words = BAD[case]
    (problem,) = problems_of(WorkerSettings, {"role": "decode", **make(ca, folder)})
    assert problem.startswith(f"{option}: ")
    assert words in problem


def test_all_problems_come_at_once(ca: Authority, folder: Path) -> None:
    old = ca.issue("stale", from_day=-3, to_day=-1)
    options = {
        **_with(ca, tls_key_file="/no/key", tls_ca_file="/no/ca"),
        "ssl_certfile": str(old.certificate),
        "ssl_keyfile": str(old.key),
        "ssl_ca_certs": "/no/clients",
        "port": "70000",
    }
    problems = problems_of(GatewaySettings, options)
    assert sorted(problem.split(": ")[0] for problem in problems) == [
        *("--port", "--ssl-ca-certs", "--ssl-certfile", "--tls-ca-file", "--tls-key-file")
    ]


def test_certificates_open_a_host_that_others_reach(ca: Authority) -> None:
    worker, public = ca.issue("open", "worker"), ca.issue("public", dns=("llm.example",))
    load_settings(WorkerSettings, {"role": "decode", "host": "10.1.2.3", **worker.options()})
    load_settings(GatewaySettings, {"host": "10.1.2.3", **public.options("ssl")})
    gateway: Files = ca.issue("gateway-only", "gateway")
    (problem,) = problems_of(GatewaySettings, {"host": "10.1.2.3", **gateway.options()})
    assert problem.startswith("--host: ")  # between processes is not towards clients
    assert "--ssl-certfile" in problem
