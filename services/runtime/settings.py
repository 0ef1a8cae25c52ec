"""Every option of every process, once: command line flags, BATON_* variables and YAML keys are all made from these fields.

A check that looks at two fields is a validator of the later one, so that it runs, and is reported, beside the problems of
all other fields. Values come in through ``settings_loader.load_settings``.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, ValidationInfo, field_validator

from baton.services.core.failpoints import parse_failpoints
from baton.services.runtime.admin_options import AdminOptions
from baton.services.runtime.certificates import empty_context, load_ca
from baton.services.runtime.option_set import PathList, Port, PublicPort, SecretList, Size, StringList, readable
from baton.services.runtime.tls_options import KVTLSOptions, PublicTLSOptions, TLSOptions

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_MIB = 1024 * 1024


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether ``host`` stands for every interface, so that nobody can connect to it by that name."""
    return host in ("0.0.0.0", "::")  # noqa: S104  compared, not bound


class Settings(TLSOptions):
    """What every process has."""

    panel = "Process"
    # The last of the files with which a listener on --host speaks TLS.
    listener_tls: ClassVar[str] = "tls_ca_file"

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe message to log.")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, JSON elsewhere."
    )
    allow_insecure_bind: bool = Field(False, description="Allow a --host that other machines can reach, without TLS.")
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    drain_timeout_s: float = Field(
        30.0, ge=0, le=3600, description="Seconds that running requests get to finish on SIGTERM."
    )
    peer_timeout_s: float = Field(
        2.5, ge=1.0, le=600, description="Seconds of silence after which a worker, or a gateway, counts as lost."
    )

    failpoints: str | None = Field(
        None, description="For tests: places where the process fails, or 'on' to set them while it runs. Loopback only."
    )

    @field_validator("failpoints")
    @classmethod
    def _check_failpoints(cls, failpoints: str | None, info: ValidationInfo) -> str | None:
        if failpoints is None:
            return None
        host = info.data.get("host")
        if host is not None and not is_loopback(host):
            raise ValueError(f"only for a process that this machine alone can reach, not with --host {host}")
        parse_failpoints(failpoints)
        return failpoints

    @field_validator("host")
    @classmethod
    def _refuse_open_host(cls, host: str, info: ValidationInfo) -> str:
        is_plain = cls.listener_tls in info.data and info.data[cls.listener_tls] is None
        if info.data.get("allow_insecure_bind") is False and is_plain and not is_loopback(host):
            flags = "--ssl-certfile and --ssl-keyfile" if cls.listener_tls == "ssl_certfile" else "--tls-cert-file"
            raise ValueError(
                f"{host} can be reached from other machines, without TLS; give certificates ({flags}), or add "
                "--allow-insecure-bind to do without"
            )
        return host


class BusSettings(Settings):
    """How a process finds the others."""

    panel = "Discovery"

    cluster: str = Field(
        "default", description="Name that keeps installations on one NATS server apart: [a-z0-9-], up to 64."
    )
    nats_url: str | None = Field(
        "nats://127.0.0.1:4222",
        description="NATS servers, comma-separated. Empty or 'none': do without; name workers by --worker.",
    )
    nats_token_file: Path | None = Field(None, description="File with the token that the NATS server asks for.")
    nats_ca_file: Path | None = Field(
        None, description="CA of tls:// servers (PEM). Default: --tls-ca-file, or the system's."
    )
    block_key_file: Path | None = Field(
        None,
        description="File with the secret that keys block names, 16 to 64 bytes; the same for all workers and gateways.",
    )

    @field_validator("cluster")
    @classmethod
    def _check_cluster(cls, cluster: str) -> str:
        if not _NAME.fullmatch(cluster):
            raise ValueError(
                f"must be 1 to 64 characters of [a-z0-9-], not starting or ending with '-', got {cluster!r}"
            )
        return cluster

    @field_validator("nats_url")
    @classmethod
    def _check_nats_url(cls, url: str | None) -> str | None:
        if url is None or url.strip().lower() in ("", "none"):
            return None
        for part in url.split(","):
            split = urlsplit(part.strip())
            if split.scheme not in ("nats", "tls") or not split.hostname:
                raise ValueError(f"must look like nats://host:4222 or tls://host:4222, got {part.strip()!r}")
        return url

    @field_validator("nats_token_file")
    @classmethod
    def _check_token_file(cls, path: Path | None) -> Path | None:
        return readable(path)

    @field_validator("nats_ca_file")
    @classmethod
    def _check_nats_ca(cls, path: Path | None) -> Path | None:
        if path is not None:
            load_ca(empty_context(), path)
        return path

    @field_validator("block_key_file")
    @classmethod
    def _check_block_key(cls, path: Path | None) -> Path | None:
        if readable(path) is not None and path is not None and not 16 <= path.stat().st_size <= 64:
            raise ValueError(f"{path} must hold 16 to 64 bytes, it holds {path.stat().st_size}")
        return path


class ModelSettings(Settings, KVTLSOptions):
    """What is served and with how much memory."""

    panel = "Model and memory"

    model: str | None = Field(None, description="Model folder or Hugging Face id. Default: the bundled demo model.")
    served_model_name: str | None = Field(None, min_length=1, max_length=256, description="Name that clients ask for.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and KV cache."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    transport: Literal["auto", "shm", "tcp", "nixl", "cuda_ipc"] = Field(
        "auto",
        description="How KV blocks travel. auto: what works best, of cuda_ipc (GPUs of one host), shm, nixl (RDMA) and tcp.",
    )
    kv_link_mb_per_s: float | None = Field(
        None, gt=0, description="For tests: KV blocks arrive as if over a link of so many megabytes per second."
    )
    kv_link_latency_ms: float = Field(
        0.0, ge=0, le=60_000, description="For tests: and so many milliseconds later; needs --kv-link-mb-per-s."
    )
    block_size: int = Field(16, ge=1, le=256, description="Tokens per KV block; a power of two.")
    kv_cache_memory: Size = Field(ByteSize(1024 * _MIB), description="KV cache of each worker, for example 512MiB.")
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt + output in tokens. Default: the model's limit."
    )
    max_num_seqs: int = Field(64, ge=1, le=65536, description="Most sequences in a batch.")
    max_num_batched_tokens: int = Field(2048, ge=1, le=1 << 20, description="Most tokens in one engine step.")
    prefix_caching: bool = Field(True, description="Reuse the KV blocks of known prefixes.")
    session_cache_share: float = Field(0.5, ge=0, le=1, description="Share of the KV blocks that sessions may keep.")
    speculative: Literal["off"] = Field("off", description="Speculative decoding; this version has none.")
    threads_per_worker: int | None = Field(
        None, ge=1, le=4096, description="CPU threads of each worker. Default: cores / workers."
    )

    stuck_after_s: float = Field(
        3.5,
        ge=0,
        le=3600,
        description="Seconds without progress after which a worker ends itself; a long step may take longer. 0: never.",
    )

    max_quarantine_share: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Share of the KV blocks that may still be written to although given up; a worker with more is unhealthy.",
    )
    replace_unhealthy_after_s: float = Field(
        60.0,
        gt=0,
        le=86400,
        description="Seconds after which a worker that stays unhealthy ends itself, to be replaced.",
    )

    @field_validator("block_size")
    @classmethod
    def _check_block_size(cls, size: int) -> int:
        if size & (size - 1):
            raise ValueError(f"must be a power of two, got {size}")
        return size


class GatewayOptions(Settings, PublicTLSOptions, AdminOptions):
    """The public side, as ``baton gateway`` and ``baton serve`` share it."""

    panel = "Gateway"
    listener_tls = "ssl_certfile"

    port: Port = Field(8000, description="REST port. 0: any free one.")
    grpc_port: Port = Field(8001, description="gRPC port. 0: any free one.")
    api_key: SecretList = Field(
        [], description="Key that clients must send; may be repeated. Default: no key is needed."
    )
    api_key_file: PathList = Field(
        [], description="File with one API key per line, plain or as sha256:HEX; may be repeated. Changes are noticed."
    )
    tenants_file: Path | None = Field(
        None, description="YAML file with tenants: hashed keys, weights, limits and quotas. Changes are noticed."
    )
    max_concurrent_requests: int = Field(1024, ge=1, description="Requests at once; more are refused with 503.")
    max_body_size: Size = Field(ByteSize(16 * _MIB), description="Largest request body.")
    request_timeout_s: float = Field(600.0, gt=0, le=86400, description="Seconds after which a request is given up.")
    worker_wait_s: float = Field(
        60.0,
        ge=0,
        le=86400,
        description="Seconds that a request waits for a worker, or, when it names no targets, for its turn; then a 503.",
    )
    placement: Literal["auto", "remote", "local"] = Field(
        "remote",
        description="Who prefills: remote: the prefill pool, where there is one; local: the decode worker; auto: the cheaper.",
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "mistral", "pythonic", "none"] = Field(
        "auto", description="How the model writes calls of tools. auto: what its chat template gives away."
    )
    reasoning_parser: Literal["auto", "think", "mistral", "none"] = Field(
        "auto", description="What stands around the model's reasoning. auto: what its chat template gives away."
    )
    profile: Path | None = Field(
        None, description="What workers cost before anything was learned of them: a file that baton profile wrote."
    )
    fetch: Literal["auto", "always", "off"] = Field(
        "auto", description="KV blocks that another worker holds: auto: fetched when that beats computing them."
    )

    @field_validator("grpc_port")
    @classmethod
    def _ports_differ(cls, grpc_port: int, info: ValidationInfo) -> int:
        if grpc_port and grpc_port == info.data.get("port"):
            raise ValueError(f"must differ from --port, both are {grpc_port}")
        admin_port = info.data.get("admin_port")
        for port, flag in ((info.data.get("port"), "--port"), (grpc_port, "--grpc-port")):
            if admin_port and admin_port == port:
                raise ValueError(f"--admin-port must differ from {flag}, both are {admin_port}")
        return grpc_port

    @field_validator("api_key_file")
    @classmethod
    def _check_key_files(cls, paths: list[Path]) -> list[Path]:
        for path in paths:
            readable(path)
        return paths

    @field_validator("tenants_file")
    @classmethod
    def _check_tenants_file(cls, path: Path | None) -> Path | None:
        return readable(path)

    @property
    def needs_key(self) -> bool:
        """Whether clients must send a key, whichever it is."""
        return bool(self.api_key or self.api_key_file or self.tenants_file)


class GatewaySettings(GatewayOptions, BusSettings):
    """``baton gateway``."""

    panel = "Model and workers"
    hidden = frozenset({"admin_url_file"})
    tls_roles = frozenset({"gateway"})

    model: str | None = Field(
        None, description="Model folder or Hugging Face id, for its tokenizer. Default: the demo model."
    )
    served_model_name: str | None = Field(None, min_length=1, max_length=256, description="Name that clients ask for.")
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt + output in tokens. Default: what the workers say."
    )
    admin_url_file: Path | None = Field(None, description="File that gets the URL of the admin listener.")
    worker: StringList = Field([], description="host:port of a worker that is there without NATS; may be repeated.")

    @field_validator("worker")
    @classmethod
    def _check_workers(cls, addresses: list[str]) -> list[str]:
        for address in addresses:
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"must look like host:port, got {address!r}")
        return addresses


class WorkerSettings(ModelSettings, BusSettings):
    """``baton prefill`` and ``baton decode``."""

    panel = "Worker"
    hidden = frozenset({"role"})
    tls_roles = frozenset({"worker"})

    role: Literal["prefill", "decode", "colocated"] = Field(..., description="What the worker does.")
    worker_id: str | None = Field(
        None, description="Stable name: [a-z0-9-], up to 64. Default: role and a random number."
    )
    port: Port = Field(0, description="gRPC port. 0: any free one.")
    kv_port: Port = Field(0, description="Port of the KV data plane. 0: any free one.")
    advertise_host: str | None = Field(
        None, min_length=1, description="Host that others reach this worker by. Default: --host."
    )
    advertise_port: PublicPort = Field(
        None, description="gRPC port that others reach this worker by, behind NAT, say. Default: the one it listens on."
    )
    advertise_kv_port: PublicPort = Field(
        None, description="Port that peers reach its KV data plane by. Default: the one it listens on."
    )

    @field_validator("worker_id")
    @classmethod
    def _check_worker_id(cls, worker_id: str | None) -> str | None:
        if worker_id is not None and not _NAME.fullmatch(worker_id):
            raise ValueError(
                f"must be 1 to 64 characters of [a-z0-9-], not starting or ending with '-', got {worker_id!r}"
            )
        return worker_id

    @field_validator("kv_port")
    @classmethod
    def _ports_differ(cls, kv_port: int, info: ValidationInfo) -> int:
        if kv_port and kv_port == info.data.get("port"):
            raise ValueError(f"must differ from --port, both are {kv_port}")
        return kv_port

    @field_validator("advertise_host")
    @classmethod
    def _need_advertise_host(cls, advertise_host: str | None, info: ValidationInfo) -> str | None:
        host = info.data.get("host", "")
        if advertise_host is None and is_wildcard(host):
            raise ValueError(f"needed with --host {host}: peers cannot connect to a wildcard address")
        return advertise_host

    @property
    def public_host(self) -> str:
        """The host in the addresses that this worker announces."""
        return self.advertise_host or self.host


class ServeSettings(ModelSettings, GatewayOptions):
    """``baton serve``."""

    panel = "Workers"
    tls_roles = frozenset({"gateway", "worker"})
    asks_itself = True

    mode: Literal["disaggregated", "colocated"] = Field(
        "disaggregated", description="colocated: workers do both parts."
    )
    prefill: int = Field(1, ge=1, le=64, description="Prefill workers.")
    decode: int = Field(1, ge=1, le=64, description="Decode workers; with --mode colocated, workers that do both.")
    replace_unresponsive_after_s: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Seconds without an answer after which a worker is killed and replaced. 0: never.",
    )
