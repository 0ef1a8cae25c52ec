"""``baton doctor`` about certificate files: what is wrong is named, with how to mend it, before a process stumbles over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.certificates import CLIENT_AUTH, SERVER_AUTH, Authority, Files

from baton.services.local.doctor import Finding, Level, PemFiles, Questions
from baton.services.local.doctor_certificates import check_certificates
from baton.services.runtime.client_tls import CA_VARIABLE

BETWEEN, PUBLIC = "TLS between processes", "TLS towards clients"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


def pem(files: Files, ca: Path | None) -> PemFiles:
    files.key.chmod(0o600)
    return PemFiles(files.certificate, files.key, ca)


def look(host: str = "127.0.0.1", url: str = "https://127.0.0.1:8000", **files: PemFiles) -> dict[str, Finding]:
    asked = Questions(None, url, None, host, 8000, 8001, 1 << 20, **files)
    return {finding.what: finding for finding in check_certificates(asked)}


def between(files: Files, **change: Any) -> dict[str, Finding]:
    found = look(between=pem(files, change.get("ca", files.ca)))
    assert all(finding.mend for finding in found.values() if finding.level is not Level.OK)
    return {what.removeprefix(f"{BETWEEN}, "): finding for what, finding in found.items()}


def public(files: Files, ca: Path | None = None, **asked: str) -> dict[str, Finding]:
    found = look(public=pem(files, ca), **asked)
    assert all(finding.mend for finding in found.values() if finding.level is not Level.OK)
    return {what.removeprefix(f"{PUBLIC}, "): finding for what, finding in found.items()}


def bad(found: dict[str, Finding]) -> dict[str, Level]:
    return {what: finding.level for what, finding in found.items() if finding.level is not Level.OK}


def test_without_certificates_there_is_one_line_and_nothing_to_mend() -> None:
    assert [finding.level for finding in look().values()] == [Level.OK]


@pytest.mark.parametrize(
    ("roles", "usages", "words"),
    [
        (("gateway",), (CLIENT_AUTH,), "gateway of test.example: for baton gateway"),
        (("worker",), (CLIENT_AUTH, SERVER_AUTH), "worker of test.example: for baton prefill and baton decode"),
        (("gateway", "worker"), None, "gateway and worker of test.example: for baton serve"),
    ],
)
def test_good_files_between_processes_are_well(ca: Authority, roles: tuple[str, ...], usages: Any, words: str) -> None:
    found = between(ca.issue("good", *roles, usages=usages, to_day=40))
    assert bad(found) == {}
    assert found.keys() == {"files", "dates", "CA", "role", "signature"}
    assert words in found["role"].found
    assert "is valid for 39 more days" in found["dates"].found


def test_what_is_wrong_between_processes_is_named(ca: Authority, tmp_path: Path) -> None:
    good = ca.issue("good", "worker", to_day=40)
    other = Authority(tmp_path, "other CA")

    found = between(ca.issue("nobody"))
    assert bad(found) == {"role": Level.FAIL}
    assert "URI spiffe://TRUST-DOMAIN/baton/gateway or /worker" in found["role"].mend

    found = between(ca.issue("nameless", "gateway", to_day=40), ca=other.path)
    assert bad(found) == {"signature": Level.FAIL}
    assert "did not sign the certificate" in found["signature"].found

    found = between(ca.issue("client", "worker", usages=(CLIENT_AUTH,), to_day=40))
    assert bad(found) == {"signature": Level.FAIL}
    assert "lacks the extended key usage serverAuth" in found["signature"].found

    found = between(Files(good.certificate, ca.issue("another", "worker").key, good.ca))
    assert bad(found) == {"files": Level.FAIL}
    assert "is not the one of the certificate" in found["files"].found

    found = look(between=PemFiles(good.certificate, tmp_path / "gone.key", good.ca))
    assert bad(found) == {f"{BETWEEN}, files": Level.FAIL}
    assert "cannot read" in found[f"{BETWEEN}, files"].found

    found = between(good, ca=None)
    assert bad(found) == {"CA": Level.FAIL}
    found = between(good, ca=good.certificate)
    assert bad(found) == {"CA": Level.FAIL, "signature": Level.FAIL}
    assert "holds no CA certificate" in found["CA"].found


@pytest.mark.parametrize(
    ("days", "level", "words"),
    [
        ((-3, -1), Level.FAIL, "expired at"),
        ((1, 3), Level.FAIL, "valid only from"),
        ((-30, 6.5), Level.WARN, "is valid for 6 more days"),
        ((-5, 1.5), Level.WARN, "is valid for 35 more hours"),
        ((-1, 2.5), Level.OK, "is valid for 2 more days"),  # short-lived, two thirds of its time left
    ],
)
def test_dates_are_told_with_what_is_left(ca: Authority, days: tuple[float, float], level: Level, words: str) -> None:
    found = between(ca.issue("dated", "worker", from_day=days[0], to_day=days[1]))["dates"]
    assert found.level is level
    assert words in found.found


def test_a_key_that_everybody_may_read_is_a_warning(ca: Authority) -> None:
    files = ca.issue("open", "gateway", to_day=40)
    files.key.chmod(0o644)
    found = look(between=PemFiles(files.certificate, files.key, files.ca))
    assert bad(found) == {f"{BETWEEN}, key": Level.WARN}
    assert found[f"{BETWEEN}, key"].mend == f"chmod 400 {files.key}"


def test_half_of_a_pair_is_a_failure_that_names_the_option(ca: Authority) -> None:
    files = ca.issue("half", "worker", to_day=40)
    found = look(between=PemFiles(files.certificate, None, files.ca), public=PemFiles(None, files.key))
    assert bad(found) == {f"{BETWEEN}, files": Level.FAIL, f"{PUBLIC}, files": Level.FAIL}
    assert found[f"{BETWEEN}, files"].found == "--tls-cert-file without --tls-key-file"
    assert found[f"{PUBLIC}, files"].found == "--ssl-keyfile without --ssl-certfile"
    assert look(public=PemFiles(ca=files.ca))[f"{PUBLIC}, files"].level is Level.FAIL


def test_the_public_certificate_is_for_the_hosts_that_clients_ask_for(
    ca: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CA_VARIABLE, str(ca.path))
    web = ca.issue("web", dns=("*.example.com", "localhost"), ips=("127.0.0.1",), to_day=40)
    assert bad(public(web)) == {}
    for asked in ({"url": "https://llm.example.com"}, {"host": "localhost", "url": "https://localhost:8000"}):
        assert bad(public(web, **asked)) == {}
    found = public(web, url="https://llm.example.org:8443")
    assert bad(found) == {"name llm.example.org": Level.FAIL}
    assert "not valid for 'llm.example.org'" in found["name llm.example.org"].found
    assert "name 127.0.0.1" in found
    found = public(web, host="0.0.0.0", url="http://127.0.0.1:8000")
    assert bad(found) == {}
    assert found["names"].found == "clients have to use one of *.example.com, localhost, 127.0.0.1"
    assert bad(public(ca.issue("blank", to_day=40), host="::", url="http://x")) == {"names": Level.FAIL}


def test_who_signed_the_public_certificate_and_what_it_is_for_are_looked_at(
    ca: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Authority(tmp_path, "other CA")
    monkeypatch.setenv(CA_VARIABLE, str(other.path))
    web = ca.issue("web", ips=("127.0.0.1",), to_day=40)
    found = public(web)
    assert bad(found) == {"signature": Level.WARN}
    assert "--ca-file" in found["signature"].mend
    monkeypatch.setenv(CA_VARIABLE, str(ca.path))
    assert bad(public(ca.issue("c", ips=("127.0.0.1",), usages=(CLIENT_AUTH,), to_day=40))) == {"files": Level.FAIL}
    server = ca.issue("s", ips=("127.0.0.1",), usages=(SERVER_AUTH,), to_day=40)
    assert bad(public(server)) == {}
    assert bad(public(server, other.path)) == {"own use": Level.WARN}  # baton serve asks with it
    assert bad(public(web, web.certificate)) == {"clients' CA": Level.FAIL}
