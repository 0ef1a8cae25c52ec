"""Options that name certificates. Each problem stands at the option whose file it is in."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, ValidationInfo, field_validator

from baton.services.runtime.certificates import (
    CertificateProblem,
    check_dates,
    check_signed,
    describe,
    empty_context,
    load_ca,
    load_pair,
    read_pem,
)
from baton.services.runtime.option_set import OptionSet
from baton.services.runtime.peers import WORKER_NAME


class TLSOptions(OptionSet):
    """Between our own processes: gRPC, KV blocks, and the certificate shown to NATS."""

    panel = "TLS between processes"
    # What this process is to others; its certificate must say so.
    tls_roles: ClassVar[frozenset[str]] = frozenset()

    # In this order: each check needs the file before it.
    tls_key_file: Path | None = Field(None, description="Private key of --tls-cert-file (PEM). Changes are noticed.")
    tls_cert_file: Path | None = Field(
        None,
        description="Certificate (PEM, with its chain) that this process shows to other Baton processes. Changes are noticed.",
    )
    tls_ca_file: Path | None = Field(
        None, description="CA that signs the certificates of all Baton processes (PEM). With it they all need one."
    )

    @field_validator("tls_key_file")
    @classmethod
    def _check_tls_key(cls, key: Path | None) -> Path | None:
        if key is not None:
            read_pem(key, "PRIVATE KEY")
        return key

    @field_validator("tls_cert_file")
    @classmethod
    def _check_tls_certificate(cls, certificate: Path | None, info: ValidationInfo) -> Path | None:
        key = info.data.get("tls_key_file")
        if not _is_pair(certificate, key, "tls_key_file", info) or certificate is None or key is None:
            return certificate
        is_client_only = cls.tls_roles == {"gateway"}
        found = describe(certificate, key, as_client=is_client_only)
        check_dates(certificate, found)
        if missing := cls.tls_roles - found.peer.roles:
            uris = " and ".join(f"spiffe://TRUST-DOMAIN/baton/{role}" for role in sorted(missing))
            raise CertificateProblem(
                f"the certificate in {certificate} is that of {found.peer}; this process needs one with the URI {uris}"
            )
        if "worker" in cls.tls_roles and WORKER_NAME not in found.dns_names:
            raise CertificateProblem(
                f"the certificate in {certificate} lacks the DNS name {WORKER_NAME}, by which workers are known "
                "whatever their address; issue one with it"
            )
        return certificate

    @field_validator("tls_ca_file")
    @classmethod
    def _check_tls_ca(cls, ca: Path | None, info: ValidationInfo) -> Path | None:
        certificate, key = info.data.get("tls_cert_file"), info.data.get("tls_key_file")
        if ca is None:
            if certificate is not None:
                raise CertificateProblem(
                    "needed with --tls-cert-file: the CA that signs the other processes' certificates"
                )
            return ca
        load_ca(empty_context(), ca)
        if certificate is not None and key is not None:
            if cls.tls_roles != {"gateway"}:
                check_signed(certificate, key, ca)
            check_signed(certificate, key, ca, as_client=True)
        elif "tls_cert_file" in info.data and "tls_key_file" in info.data:
            raise CertificateProblem("needs --tls-cert-file and --tls-key-file beside it")
        return ca


class KVTLSOptions(OptionSet):
    """For workers: KV blocks are users' prompts."""

    panel = "TLS between processes"

    allow_unencrypted_kv: bool = Field(
        False, description="Let KV blocks travel by nixl beside --tls-cert-file: it does not encrypt them."
    )

    @field_validator("transport", check_fields=False)
    @classmethod
    def _check_transport(cls, transport: str, info: ValidationInfo) -> str:
        is_allowed = info.data.get("allow_unencrypted_kv")
        if transport == "nixl" and not is_allowed and info.data.get("tls_cert_file") is not None:
            raise ValueError(
                "nixl does not encrypt KV blocks, and --tls-cert-file is given; take tcp, or add --allow-unencrypted-kv"
            )
        return transport


class PublicTLSOptions(OptionSet):
    """Towards clients: REST and gRPC of a gateway. Named as uvicorn names them."""

    panel = "TLS towards clients"
    asks_itself: ClassVar[bool] = False

    ssl_keyfile: Path | None = Field(None, description="Private key of --ssl-certfile (PEM). Changes are noticed.")
    ssl_certfile: Path | None = Field(
        None,
        description="Certificate (PEM, with its chain) of REST and gRPC, which then speak TLS. Changes are noticed.",
    )
    ssl_ca_certs: Path | None = Field(
        None,
        description="CA of clients (PEM): they need a certificate too. REST leaves health, readiness and metrics open.",
    )

    @field_validator("ssl_keyfile")
    @classmethod
    def _check_ssl_key(cls, key: Path | None) -> Path | None:
        if key is not None:
            read_pem(key, "PRIVATE KEY")
        return key

    @field_validator("ssl_certfile")
    @classmethod
    def _check_ssl_certificate(cls, certificate: Path | None, info: ValidationInfo) -> Path | None:
        key = info.data.get("ssl_keyfile")
        if _is_pair(certificate, key, "ssl_keyfile", info) and certificate is not None and key is not None:
            load_pair(empty_context(), certificate, key)
            check_dates(certificate, describe(certificate, key))
        return certificate

    @field_validator("ssl_ca_certs")
    @classmethod
    def _check_ssl_ca(cls, ca: Path | None, info: ValidationInfo) -> Path | None:
        if ca is not None:
            load_ca(empty_context(), ca)
            certificate, key = info.data.get("ssl_certfile", ca), info.data.get("ssl_keyfile")
            if certificate is None:
                raise CertificateProblem("needs --ssl-certfile and --ssl-keyfile beside it")
            if cls.asks_itself and "ssl_certfile" in info.data and key is not None:
                try:
                    describe(certificate, key, as_client=True)
                except CertificateProblem as problem:
                    raise CertificateProblem(f"{problem}: with it baton serve asks its own gateway how it is") from None
        return ca


def _is_pair(certificate: Path | None, key: Path | None, key_field: str, info: ValidationInfo) -> bool:
    """Whether both are there and the key may be used. Raises CertificateProblem where one was given without the other."""
    key_flag = "--" + key_field.replace("_", "-")
    if certificate is None:
        if key is not None:
            raise CertificateProblem(f"needed with {key_flag}")
        return False
    read_pem(certificate, "CERTIFICATE")
    if key_field not in info.data:  # its own problem is told
        return False
    if key is None:
        raise CertificateProblem(f"needs {key_flag} beside it")
    return True
