"""TLS of whoever asks a gateway: our own commands, the load generator, and ``baton serve`` asking its own."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from baton.services.runtime.certificates import OTHER_NAME, CertificateProblem, first_certificate, load_ca, load_pair

# As curl and OpenSSL have it: a file with the CAs to trust, instead of the system's.
CA_VARIABLE = "SSL_CERT_FILE"
# For gateways that ask their clients for a certificate.
CERTIFICATE_VARIABLE, KEY_VARIABLE = "BATON_CLIENT_CERT_FILE", "BATON_CLIENT_KEY_FILE"


def client_context() -> ssl.SSLContext:
    """Trusts the system's CAs, or those of SSL_CERT_FILE. Raises CertificateProblem for files that cannot be used."""
    ca = os.environ.get(CA_VARIABLE)
    if ca:
        load_ca(
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), Path(ca)
        )  # OpenSSL itself says nothing of a file that is not there
    context = ssl.create_default_context()
    certificate, key = os.environ.get(CERTIFICATE_VARIABLE), os.environ.get(KEY_VARIABLE)
    if bool(certificate) != bool(key):
        raise CertificateProblem(f"{CERTIFICATE_VARIABLE} and {KEY_VARIABLE} belong together; set both or neither")
    if certificate and key:
        load_pair(context, Path(certificate), Path(key))
    return context


def own_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """For a gateway with this very certificate, whatever its names, and showing it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=first_certificate(certificate.read_text(encoding="ascii", errors="replace")))
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    load_pair(context, certificate, key)
    return context


def advice(error: ssl.SSLError) -> str:
    """What to do about a handshake that failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in OTHER_NAME:
            return "use a host name that stands in the server's certificate"
        return "name the CA that signed the server's certificate: --ca-file FILE, or SSL_CERT_FILE"
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"):
        return "it speaks no TLS: its URL begins with http://"
    return "if it asks for a certificate, name one with BATON_CLIENT_CERT_FILE and BATON_CLIENT_KEY_FILE"
