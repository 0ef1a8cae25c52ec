"""Certificates as an operator would have them: a CA, and files signed by it. Made anew by each test run; nothing is kept."""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from baton.services.runtime.tls import TLSFiles, internal_files
from baton.services.runtime.tls_options import TLSOptions

_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Files:
    """What an operator hands to a process."""

    certificate: Path
    key: Path
    ca: Path

    def options(self, prefix: str = "tls") -> dict[str, str]:
        """Fields of settings: of the internal certificate, or with ``ssl`` of the public one, without a client CA."""
        if prefix == "ssl":
            return {"ssl_certfile": str(self.certificate), "ssl_keyfile": str(self.key)}
        return {
            "tls_cert_file": str(self.certificate),
            "tls_key_file": str(self.key),
            "tls_ca_file": str(self.ca),
        }

    def flags(self, prefix: str = "tls") -> list[str]:
        """The same as flags."""
        return [part for name, value in self.options(prefix).items() for part in (f"--{name.replace('_', '-')}", value)]

    def in_use(self) -> TLSFiles:
        """As a process has them between itself and others."""
        files = internal_files(TLSOptions.model_validate(self.options()))
        assert files is not None
        return files

    def as_client(self) -> ssl.SSLContext:
        """Of a client that shows the certificate and trusts the CA, whatever the name."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.check_hostname = False
        context.load_cert_chain(self.certificate, self.key)
        return context


def without_certificate(ca: Path) -> ssl.SSLContext:
    """Of a client that shows none."""
    context = ssl.create_default_context(cafile=str(ca))
    context.check_hostname = False
    return context


class Authority:
    """A CA whose files are in ``folder``."""

    def __init__(self, folder: Path, name: str = "test CA") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = (
            _builder(subject, subject, self._key.public_key(), -1, 10)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name.replace(' ', '-')}.crt"
        self.path.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str,
        *roles: str,
        trust_domain: str = "test.example",
        dns: tuple[str, ...] = (),
        ips: tuple[str, ...] = (),
        from_day: float = -1,
        to_day: float = 2,
        usages: tuple[x509.ObjectIdentifier, ...] | None = None,
        password: bytes | None = None,
    ) -> Files:
        """A certificate with these roles; a worker's has its DNS name. Days are from now. An existing one is replaced."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(f"spiffe://{trust_domain}/baton/{role}") for role in roles
        ]
        names += [x509.DNSName(one) for one in (*dns, *(("baton-worker",) if "worker" in roles else ()))]
        names += [x509.IPAddress(ipaddress.ip_address(one)) for one in ips]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, self._certificate.subject, key.public_key(), from_day, to_day).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if usages is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        files = Files(self._folder / f"{name}.crt", self._folder / f"{name}.key", self.path)
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        _replace(files.key, pem)
        _replace(files.certificate, certificate.public_bytes(serialization.Encoding.PEM))
        return files


CLIENT_AUTH, SERVER_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, from_day: float, to_day: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now + from_day * _DAY,
        not_valid_after=now + to_day * _DAY,
    )


def _replace(path: Path, content: bytes) -> None:
    """As cert-manager's volumes are: never half of a file."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    os.replace(temporary, path)
