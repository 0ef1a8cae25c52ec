"""Files with API keys: plain lists, one key in a line, and the tenants file, in YAML:

    tenants:
      - name: research
        keys: ["sha256:9f86d0..."]       # what `baton key` prints; the file never holds a key itself
        weight: 2                        # its share of busy workers, against the others' weights
        max_concurrent_requests: 64
        requests_per_minute: 600
        tokens_per_minute: 200000
        tokens_per_day: 50000000
      - name: operations
        keys: ["sha256:60303a..."]
        admin: true                      # may use the operators' routes on the public port

All of a tenant's keys share its limits and its KV cache. Limits are counted by each gateway for itself, from its start.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import structlog
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.services.core.errors import ConfigurationError
from baton.services.core.tenants import Tenant, TenantLimits

MAX_FILE_BYTES = 4 * 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_Limit = Annotated[int | None, Field(ge=1, le=10**15)]
_log = structlog.get_logger(__name__)

Ring = Mapping[bytes, Tenant]  # digest of a key -> its tenant


def key_digest(key: str) -> bytes:
    """What keys are known by."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def hashed(key: str) -> str:
    """The key as a tenants file or a list of keys may hold it."""
    return f"sha256:{key_digest(key).hex()}"


def is_tenant_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def ring_of_keys(keys: Iterable[str]) -> dict[bytes, Tenant]:
    """Keys, plain or hashed, each a tenant of its own without limits. Raises ConfigurationError."""
    ring = {}
    for key in keys:
        match = _HASHED.fullmatch(key)
        if match is None and (not key or not key.isascii() or not key.isprintable() or " " in key):
            raise ConfigurationError("an API key must be visible ASCII characters without spaces, at least one")
        digest = bytes.fromhex(match[1]) if match else key_digest(key)
        ring[digest] = Tenant(_tenant_id(digest), f"key-{digest.hex()[:8]}")
    return ring


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=f"^{_NAME.pattern}$")
    keys: list[str] = Field(max_length=1000)
    weight: float = Field(1.0, gt=0, le=1000)
    admin: bool = False
    max_concurrent_requests: _Limit = None
    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    tokens_per_day: _Limit = None

    def tenant(self) -> Tenant:
        limits = {name: getattr(self, name) for name in TenantLimits.__dataclass_fields__}
        tenant_id = _tenant_id(f"name:{self.name}".encode())
        return Tenant(tenant_id, self.name, self.weight, TenantLimits(**limits), is_admin=self.admin)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tenants: list[_Entry] = Field(max_length=10_000)


def read_tenants(path: Path) -> dict[bytes, Tenant]:
    """The ring of a tenants file. Raises ConfigurationError that names every problem, and never a key."""
    try:
        parsed = _File.model_validate(yaml.safe_load(_read(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{path}: not YAML{where}") from None
    except ValidationError as error:
        problems = "; ".join(_problem(dict(details)) for details in error.errors(include_url=False)[:10])
        raise ConfigurationError(f"{path}: {problems}") from None
    ring: dict[bytes, Tenant] = {}
    names: set[str] = set()
    for entry in parsed.tenants:
        if entry.name in names:
            raise ConfigurationError(f"{path}: tenant {entry.name} is there twice")
        names.add(entry.name)
        for index, key in enumerate(entry.keys):
            match = _HASHED.fullmatch(key)
            if match is None:
                words = "must be sha256: and 64 hex digits; `baton key` makes one"
                raise ConfigurationError(f"{path}: keys[{index}] of tenant {entry.name} {words}")
            digest = bytes.fromhex(match[1])
            if digest in ring:
                raise ConfigurationError(f"{path}: keys[{index}] of tenant {entry.name} belongs to {ring[digest].name}")
            ring[digest] = entry.tenant()
    if not ring:
        raise ConfigurationError(f"{path}: no tenant has a key, so that nobody could come in")
    return ring


class TenantFiles:
    """The ring of all key files together, read again when one of them changes."""

    def __init__(self, key_files: Sequence[Path], tenants_file: Path | None) -> None:
        self._key_files = tuple(key_files)
        self._tenants_file = tenants_file
        self._state = self._look()

    def read(self) -> dict[bytes, Tenant]:
        """Raises ConfigurationError, also for files that leave nobody a key: then everybody could come in.

        A key in both a list and the tenants file is the tenant's.
        """
        ring: dict[bytes, Tenant] = {}
        for path in self._key_files:
            lines = [line.strip() for line in _read(path).splitlines()]
            ring |= ring_of_keys(line for line in lines if line)
        if self._tenants_file is not None:
            ring |= read_tenants(self._tenants_file)
        if not ring and self._key_files:
            raise ConfigurationError(f"{self._key_files[0]}: no key in it, so that everybody could come in")
        return ring

    async def watch(self, use: Callable[[Ring], None], every_s: float = 1.0) -> None:
        """Hands the ring on whenever a file has changed, until cancelled. What cannot be used is logged, and the old keys
        stay. Looking is cheap, and sees the files of a Kubernetes secret change, which come by a link to another folder."""
        while True:
            await asyncio.sleep(every_s)
            state = self._look()
            if state == self._state:
                continue
            self._state = state
            try:
                ring = self.read()
            except ConfigurationError as error:
                _log.error("the new API keys cannot be used; the old ones stay", cause=error.message)
                continue
            use(ring)
            _log.info("API keys read again", keys=len(ring))

    def _look(self) -> tuple[object, ...]:
        files = [*self._key_files, *([self._tenants_file] if self._tenants_file else [])]
        return tuple(_stamp(path) for path in files)


def _stamp(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigurationError(f"{path}: at most {MAX_FILE_BYTES} bytes are read")
        return content.decode("utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not UTF-8 text") from None


def _problem(details: dict[str, Any]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"]).lstrip(".")
    message = str(details["msg"])
    return f"{path or 'the file'}: {message[0].lower()}{message[1:]}"


def _tenant_id(secret: bytes) -> str:
    # Not the digest that keys are checked with: this one leaves the process, inside requests to workers.
    return hashlib.blake2b(secret, digest_size=16, person=b"baton-tenant").hexdigest()
