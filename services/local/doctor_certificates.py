"""What ``baton doctor`` looks at in certificate files: what a process would refuse at its start, and what it would not see."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from baton.services.local.doctor import Finding, Level, PemFiles, Questions
from baton.services.runtime.certificates import (
    Certificate,
    CertificateProblem,
    ca_end_s,
    check_dates,
    check_name,
    check_signed,
    check_trusted,
    describe,
    read_pem,
)
from baton.services.runtime.peers import GATEWAY, WORKER, WORKER_NAME
from baton.services.runtime.settings import is_wildcard

_DAY_S = 86_400.0
# Certificates that live shorter than three weeks are renewed when a third of their time is left.
_SOON_S = 7 * _DAY_S
_READABLE_BY_ALL = 0o004
_PROGRAMS = {
    frozenset({GATEWAY}): "baton gateway",
    frozenset({WORKER}): "baton prefill and baton decode",
    frozenset({GATEWAY, WORKER}): "baton serve",
}


def check_certificates(questions: Questions) -> Iterator[Finding]:
    """Those between processes, then those towards clients."""
    if not (questions.between.given or questions.public.given):
        yield Finding("TLS", Level.OK, "no certificates are named (--tls-cert-file, --ssl-certfile)")
    if questions.between.given:
        yield from _between_processes(questions.between)
    if questions.public.given:
        yield from _towards_clients(questions)


def _between_processes(files: PemFiles) -> Iterator[Finding]:
    what = "TLS between processes"
    found = yield from _pair(what, files, "tls-cert-file", "tls-key-file", as_server=False)
    certificate, key, ca = files.certificate, files.key, files.ca
    if ca is None:
        mend = "name the CA that signs the certificates of all processes: --tls-ca-file"
        yield Finding(f"{what}, CA", Level.FAIL, "none is named", mend)
    else:
        yield from _ca(f"{what}, CA", ca)
    if found is None or certificate is None or key is None:
        return
    yield _role(f"{what}, role", certificate, found)
    if ca is not None:

        def be_accepted() -> None:
            if found.peer.roles != {GATEWAY}:  # which is nobody's server here
                check_signed(certificate, key, ca)
            check_signed(certificate, key, ca, as_client=True)

        yield _looked_at(f"{what}, signature", be_accepted, f"{certificate} is accepted by who trusts {ca}")


def _towards_clients(questions: Questions) -> Iterator[Finding]:
    what, files = "TLS towards clients", questions.public
    found = yield from _pair(what, files, "ssl-certfile", "ssl-keyfile", as_server=True)
    certificate, key = files.certificate, files.key
    if found is not None and certificate is not None and key is not None:
        for host in _hosts(questions):
            look = partial(check_name, certificate, key, host)
            yield _looked_at(f"{what}, name {host}", look, f"{certificate} is for {host}")
        if not _hosts(questions):
            names = ", ".join((*found.dns_names, *found.ip_addresses))
            if names:
                yield Finding(f"{what}, names", Level.OK, f"clients have to use one of {names}")
            else:
                mend = "issue one with the host names that clients use among its DNS names"
                yield Finding(f"{what}, names", Level.FAIL, f"{certificate} names no host: no client accepts it", mend)
        try:
            check_trusted(certificate, key)
        except CertificateProblem:
            mend = "name the CA that signed it, to this and to other commands: --ca-file FILE, or SSL_CERT_FILE"
            refused = f"clients with this machine's CAs refuse {certificate}"
            yield Finding(f"{what}, signature", Level.WARN, refused, mend)
        else:
            yield Finding(f"{what}, signature", Level.OK, f"clients with this machine's CAs accept {certificate}")
    if files.ca is not None:
        yield from _ca(f"{what}, clients' CA", files.ca)
        if found is not None and certificate is not None and key is not None:
            yield _looked_at(
                f"{what}, own use",
                lambda: describe(certificate, key, as_client=True),
                f"baton serve can show {certificate} to its own gateway",
                Level.WARN,
            )


def _hosts(questions: Questions) -> list[str]:
    """What clients ask for, as far as it can be known here."""
    listens = [] if is_wildcard(questions.host) else [questions.host]
    asked = urlsplit(questions.url)
    named = [asked.hostname] if asked.scheme == "https" and asked.hostname else []
    return list(dict.fromkeys([*listens, *named]))


def _pair(
    what: str, files: PemFiles, certificate_flag: str, key_flag: str, *, as_server: bool
) -> Generator[Finding, None, Certificate | None]:
    """Returns the certificate, where it and its key can be used together. Without ``as_server`` a client's will do."""
    certificate, key = files.certificate, files.key
    if certificate is None or key is None:
        missing, given = (certificate_flag, key_flag) if certificate is None else (key_flag, certificate_flag)
        if files.certificate is not None or files.key is not None:
            yield Finding(f"{what}, files", Level.FAIL, f"--{given} without --{missing}", f"name both: --{missing}")
        else:
            mend = f"name them: --{certificate_flag} and --{key_flag}"
            yield Finding(f"{what}, files", Level.FAIL, "a CA without certificate and key", mend)
        return None
    found: list[Certificate] = []

    def read() -> None:
        read_pem(key, "PRIVATE KEY")
        found.append(describe(certificate, key, as_client=not as_server))

    finding = _looked_at(f"{what}, files", read, f"{certificate} and {key} belong together")
    yield finding
    if finding.level is Level.FAIL:
        return None
    if key.stat().st_mode & _READABLE_BY_ALL:
        yield Finding(f"{what}, key", Level.WARN, f"every user of this machine may read {key}", f"chmod 400 {key}")
    yield _dates(f"{what}, dates", certificate, found[0])
    return found[0]


def _role(what: str, certificate: Path, found: Certificate) -> Finding:
    program = _PROGRAMS.get(found.peer.roles)
    if program is None:
        uris = f"spiffe://TRUST-DOMAIN/baton/{GATEWAY} or /{WORKER}"
        mend = f"issue one with the URI {uris}, all with one trust domain"
        return Finding(what, Level.FAIL, f"{certificate} is that of {found.peer}", mend)
    if WORKER in found.peer.roles and WORKER_NAME not in found.dns_names:
        mend = f"issue one with the DNS name {WORKER_NAME}, by which workers are known whatever their address"
        return Finding(what, Level.FAIL, f"{certificate} lacks the DNS name {WORKER_NAME}", mend)
    return Finding(what, Level.OK, f"{certificate} is that of {found.peer}: for {program}")


def _dates(what: str, certificate: Path, found: Certificate) -> Finding:
    lifetime_s = found.not_after_s - found.not_before_s
    finding = _looked_at(what, lambda: check_dates(certificate, found), "")
    return _time_left(what, certificate, found.not_after_s, lifetime_s) if finding.level is Level.OK else finding


def _ca(what: str, path: Path) -> Iterator[Finding]:
    ends: list[float] = []
    finding = _looked_at(what, lambda: ends.append(ca_end_s(path)), "")
    if finding.level is not Level.OK:
        yield finding
    elif ends[0] < time.time():
        yield Finding(what, Level.FAIL, f"a CA certificate in {path} has expired", "renew it, and take the old one out")
    else:
        yield _time_left(what, path, ends[0], math.inf)


def _time_left(what: str, path: Path, end_s: float, lifetime_s: float) -> Finding:
    left_s = end_s - time.time()
    found = f"{path} is valid for {int(left_s / _DAY_S)} more days"
    if left_s < min(_SOON_S, lifetime_s / 3):
        if left_s < 2 * _DAY_S:
            found = f"{path} is valid for {int(left_s / 3600)} more hours"
        return Finding(what, Level.WARN, found, "renew it: processes take new files up without a restart")
    return Finding(what, Level.OK, found)


def _looked_at(what: str, look: Callable[[], object], good: str, bad: Level = Level.FAIL) -> Finding:
    """A problem's first words say what it is, the others what to do."""
    try:
        look()
    except CertificateProblem as problem:
        found, _, mend = str(problem).partition("; ")
        return Finding(what, bad, found, mend or "issue the files anew")
    return Finding(what, Level.OK, good)
