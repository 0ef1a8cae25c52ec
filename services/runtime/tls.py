"""Certificates in use: read again when their files change, and made into what gRPC, sockets and NATS take.

A connection keeps what it was made with. Files that change are looked at with the next connection; when they cannot be used
(half of them was written, say), what was there before goes on, and the log says so.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from baton.services.runtime.certificates import (
    Certificate,
    CertificateProblem,
    check_dates,
    describe,
    first_certificate,
    load_ca,
    load_pair,
    read_pem,
)
from baton.services.runtime.peers import WORKER_NAME
from baton.services.runtime.tls_options import PublicTLSOptions, TLSOptions

_log = structlog.get_logger(__name__)

_Signature = tuple[tuple[int, int, int], ...]
# A file may be replaced between being looked at and being read.
_MAX_READS = 3


@dataclass(frozen=True, slots=True)
class Material:
    """One generation of the files."""

    certificate_pem: bytes
    key_pem: bytes
    ca_pem: bytes | None
    certificate: Certificate
    server: ssl.SSLContext  # for connections that come in
    client: ssl.SSLContext  # for those that are made


class TLSFiles:
    """A certificate, its key, and the CA of the other side. Any thread may ask."""

    def __init__(self, certificate: Path, key: Path, ca: Path | None, make: Callable[[TLSFiles], Material]) -> None:
        """Raises CertificateProblem for files that cannot be used. ``make`` reads them."""
        self.certificate, self.key, self.ca = certificate, key, ca
        self._make = make
        self._lock = threading.Lock()
        self._looked_at = self._look()
        self._current = self._read()

    @property
    def current(self) -> Material:
        """As the files are now, or as they last could be used."""
        with self._lock:
            signature = self._look()
            if signature != self._looked_at:
                self._looked_at = signature
                try:
                    self._current = self._read()
                    _log.info("certificates read again", certificate=str(self.certificate))
                except (CertificateProblem, OSError) as problem:
                    _log.warning(
                        "certificates changed and cannot be used; the ones before stay in use", problem=str(problem)
                    )
            return self._current

    def _look(self) -> _Signature:
        """Whether the files are the same as before. One that is missing is so many zeros."""
        seen: list[tuple[int, int, int]] = []
        for path in (self.certificate, self.key, self.ca):
            try:
                stat = path.stat() if path is not None else None
            except OSError:
                stat = None
            seen.append((stat.st_mtime_ns, stat.st_ino, stat.st_size) if stat is not None else (0, 0, 0))
        return tuple(seen)

    def _read(self) -> Material:
        for _ in range(_MAX_READS):
            before = self._look()
            material = self._make(self)
            if self._look() == before:
                break
        return material


def internal_files(options: TLSOptions) -> TLSFiles | None:
    """For connections between our processes. None: they are plain."""
    if options.tls_cert_file is None or options.tls_key_file is None or options.tls_ca_file is None:
        return None
    return TLSFiles(options.tls_cert_file, options.tls_key_file, options.tls_ca_file, _internal)


def public_files(options: PublicTLSOptions) -> TLSFiles | None:
    """For clients. None: they are spoken to plainly."""
    if options.ssl_certfile is None or options.ssl_keyfile is None:
        return None
    return TLSFiles(options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs, _public)


def server_credentials(files: TLSFiles) -> grpc.ServerCredentials:
    """For a gRPC server. Where there is a CA, peers need a certificate of it."""

    def configure() -> grpc.ServerCertificateConfiguration:
        """Asked before each handshake."""
        material = files.current
        return grpc.ssl_server_certificate_configuration(
            [(material.key_pem, material.certificate_pem)], root_certificates=material.ca_pem
        )

    return grpc.dynamic_ssl_server_credentials(
        configure(), configure, require_client_authentication=files.ca is not None
    )


def channel_credentials(files: TLSFiles) -> grpc.ChannelCredentials:
    """For a channel to a worker, as the files are now: a channel keeps them."""
    material = files.current
    return grpc.ssl_channel_credentials(
        root_certificates=material.ca_pem, private_key=material.key_pem, certificate_chain=material.certificate_pem
    )


CHANNEL_OPTIONS = [("grpc.ssl_target_name_override", WORKER_NAME)]
"""Workers are dialled by address; their certificates carry this name."""


def _internal(files: TLSFiles) -> Material:
    return _material(files, ssl.TLSVersion.TLSv1_3, ssl.CERT_REQUIRED)


def _public(files: TLSFiles) -> Material:
    # Not required: probes have none. What may be asked without one is decided with the request.
    material = _material(files, ssl.TLSVersion.TLSv1_2, ssl.CERT_NONE if files.ca is None else ssl.CERT_OPTIONAL)
    material.server.set_alpn_protocols(["http/1.1"])
    if files.ca is not None:
        # Who has the server's own key may ask as well: baton serve, of its own gateway.
        leaf = first_certificate(material.certificate_pem.decode("ascii", "replace"))
        material.server.load_verify_locations(cadata=leaf)
        material.server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return material


def _material(files: TLSFiles, oldest: ssl.TLSVersion, wants_client: ssl.VerifyMode) -> Material:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context in (server, client):
        context.minimum_version = oldest
        load_pair(context, files.certificate, files.key)
        if files.ca is not None:
            load_ca(context, files.ca)
    server.verify_mode = wants_client
    server.num_tickets = 0  # nobody comes back to one
    certificate = describe(files.certificate, files.key, as_client=wants_client is ssl.CERT_REQUIRED)
    check_dates(files.certificate, certificate)
    return Material(
        read_pem(files.certificate, "CERTIFICATE"),
        read_pem(files.key, "PRIVATE KEY"),
        read_pem(files.ca, "CERTIFICATE") if files.ca is not None else None,
        certificate,
        server,
        client,
    )
