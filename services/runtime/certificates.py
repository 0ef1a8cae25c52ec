"""What is in certificate files, and whether it can be used: one sentence per problem, with the cause and what to do.

Nothing here parses a certificate. OpenSSL shakes hands with itself, in memory, with the files as they are, and is asked what
each side saw: what it accepts here it accepts on a socket.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# X509_V_FLAG_NO_CHECK_TIME: dates are looked at here, where it can be said what they are.
_NO_CHECK_TIME = 0x200000
_MAX_FLIGHTS = 8
OTHER_NAME = (62, 64)
"""``verify_code`` of a certificate for another name, or another address."""
_ROLE_PATH = "/baton/"


class CertificateProblem(ValueError):
    """Files that cannot be used. The message names them, and says what to do."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The leaf of a certificate file. Times in seconds since 1970."""

    not_before_s: float
    not_after_s: float
    uris: tuple[str, ...]
    dns_names: tuple[str, ...]
    ip_addresses: tuple[str, ...]

    @property
    def peer(self) -> Peer:
        return peer_of(self.uris)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who somebody is: ``spiffe://TRUST_DOMAIN/baton/ROLE``, once for each role."""

    trust_domain: str
    roles: frozenset[str]

    def __str__(self) -> str:
        return f"{' and '.join(sorted(self.roles))} of {self.trust_domain}" if self.roles else "nobody of ours"


NOBODY = Peer("", frozenset())


def peer_of(uris: Sequence[str]) -> Peer:
    """From a certificate's URIs. Others are passed over; roles of two trust domains in one certificate are nobody's."""
    named = []
    for uri in uris:
        domain, found, role = uri.removeprefix("spiffe://").partition(_ROLE_PATH)
        if uri.startswith("spiffe://") and found and domain and role and "/" not in domain + role:
            named.append((domain, role))
    domains = {domain for domain, _ in named}
    return Peer(domains.pop(), frozenset(role for _, role in named)) if len(domains) == 1 else NOBODY


def read_pem(path: Path, what: str) -> bytes:
    """The file's bytes. ``what`` it should hold: CERTIFICATE or PRIVATE KEY. Raises CertificateProblem."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CertificateProblem(
            f"cannot read {path}: {error.strerror}; check the path and who may read it (keys: mode 0400, owner is the "
            "user of this process)"
        ) from None
    if b"-----BEGIN " not in content or f"{what}-----".encode() not in content:
        raise CertificateProblem(f"{path} holds no PEM {what}; convert it: openssl x509 or openssl pkey, -outform PEM")
    if b"ENCRYPTED" in content:
        raise CertificateProblem(f"{path} is encrypted; take the password off: openssl pkey -in {path} -out NEW")
    return content


def load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Makes ``context`` show this certificate. Raises CertificateProblem."""

    def no_password() -> str:
        raise CertificateProblem(f"{key} is encrypted; take the password off: openssl pkey -in {key} -out NEW")

    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateProblem(
                f"the key in {key} is not the one of the certificate in {certificate}; name files that were issued together"
            ) from None
        raise CertificateProblem(
            f"{certificate} or {key} is no usable PEM: {_reason(error)}; issue them anew"
        ) from None
    except OSError as error:
        raise CertificateProblem(f"cannot read {certificate} and {key}: {error.strerror}") from None


def load_ca(context: ssl.SSLContext, path: Path) -> None:
    """Makes ``context`` trust the CA certificates in a file. Raises CertificateProblem."""
    read_pem(path, "CERTIFICATE")
    try:
        context.load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError) as error:
        raise CertificateProblem(f"{path} holds no usable CA certificate: {_reason(error)}") from None
    if not context.get_ca_certs():
        raise CertificateProblem(f"{path} holds no CA certificate (basicConstraints CA:TRUE); name the CA's own file")


def describe(certificate: Path, key: Path, *, as_client: bool = False) -> Certificate:
    """What the pair says of itself, whoever signed it and whenever. Raises CertificateProblem."""
    seen = _shown(certificate, key, _trusting(certificate), as_client=as_client, checks_time=False)
    names = [(str(kind), str(name)) for kind, name in seen.get("subjectAltName", ())]
    return Certificate(
        ssl.cert_time_to_seconds(seen["notBefore"]),
        ssl.cert_time_to_seconds(seen["notAfter"]),
        tuple(name for kind, name in names if kind == "URI"),
        tuple(name for kind, name in names if kind == "DNS"),
        tuple(name for kind, name in names if kind == "IP Address"),
    )


def check_dates(path: Path, found: Certificate, now_s: float | None = None) -> None:
    """Raises CertificateProblem for one that is not valid now."""
    now_s = time.time() if now_s is None else now_s
    if found.not_after_s < now_s:
        raise CertificateProblem(f"the certificate in {path} expired at {_date(found.not_after_s)}; renew it")
    if found.not_before_s > now_s:
        raise CertificateProblem(
            f"the certificate in {path} is valid only from {_date(found.not_before_s)}; check this machine's clock"
        )


def check_signed(certificate: Path, key: Path, ca: Path, *, as_client: bool = False) -> None:
    """Raises CertificateProblem unless who trusts ``ca`` accepts the certificate, of a client or of a server."""
    _shown(certificate, key, lambda context: load_ca(context, ca), as_client=as_client, checks_time=True)


def check_name(certificate: Path, key: Path, host: str) -> None:
    """Raises CertificateProblem unless a client that asks for ``host``, a name or an address, finds it in the certificate."""
    _shown(certificate, key, _trusting(certificate), as_client=False, checks_time=False, host=host)


def check_trusted(certificate: Path, key: Path) -> None:
    """Raises CertificateProblem unless clients here accept it: those with the CAs of SSL_CERT_FILE, or the system's."""
    _shown(certificate, key, ssl.SSLContext.load_default_certs, as_client=False, checks_time=False)


def ca_end_s(path: Path) -> float:
    """When the first of the CA certificates in a file is over, in seconds since 1970. Raises CertificateProblem."""
    context = empty_context()
    load_ca(context, path)
    return min(ssl.cert_time_to_seconds(str(ca["notAfter"])) for ca in context.get_ca_certs())


def first_certificate(pem: str) -> str:
    """The leaf: certificates stand in the order in which they signed each other."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return begin + pem.partition(begin)[2].partition(end)[0] + end + "\n"


def empty_context() -> ssl.SSLContext:
    """To try files out with."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def _trusting(certificate: Path) -> Callable[[ssl.SSLContext], None]:
    """Makes a context accept the certificate, whoever signed it. Raises CertificateProblem."""
    leaf = first_certificate(read_pem(certificate, "CERTIFICATE").decode("ascii", "replace"))

    def trust(context: ssl.SSLContext) -> None:
        context.load_verify_locations(cadata=leaf)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN

    return trust


def _shown(
    certificate: Path,
    key: Path,
    trust: Callable[[ssl.SSLContext], None],
    *,
    as_client: bool,
    checks_time: bool,
    host: str | None = None,
) -> Mapping[str, Any]:
    """What one side sees of the certificate, shown by the other as a server's (at ``host``), or as a client's."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    load_pair(server, certificate, key)
    looker = client
    if as_client:
        load_pair(client, certificate, key)
        looker = server
    looker.verify_mode = ssl.CERT_REQUIRED
    trust(looker)
    client.check_hostname = host is not None
    if not checks_time:
        looker.verify_flags = ssl.VerifyFlags(looker.verify_flags | _NO_CHECK_TIME)
    try:
        seen = _shake_hands(server, client, host)[1 if as_client else 0].getpeercert()
    except ssl.SSLCertVerificationError as error:
        raise CertificateProblem(_why_refused(certificate, error, as_client=as_client)) from None
    except ssl.SSLError as error:
        raise CertificateProblem(f"{certificate} cannot be used: {_reason(error)}") from None
    return seen or {}


def _shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext, host: str | None
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends of a connection in memory: (client, server)."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_side=False, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(_MAX_FLIGHTS):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends


def _why_refused(certificate: Path, error: ssl.SSLCertVerificationError, *, as_client: bool) -> str:
    if error.verify_message == "unsuitable certificate purpose":
        usage = "clientAuth" if as_client else "serverAuth"
        return f"the certificate in {certificate} lacks the extended key usage {usage}; issue one with it"
    if error.verify_code in OTHER_NAME:
        return (
            f"the certificate in {certificate} has other names: {error.verify_message}; issue one that has it as well"
        )
    if "expired" in error.verify_message:
        return f"a certificate in the chain of {certificate} has expired; renew the CA's and issue this one anew"
    return (
        f"it did not sign the certificate in {certificate} ({error.verify_message}); name the CA that did, or append the "
        "certificates between the two to that file"
    )


def _reason(error: OSError) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return str(reason or error).replace("_", " ").lower()


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
