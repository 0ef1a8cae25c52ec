"""What ``baton serve`` prints when everything is ready."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from baton.services.runtime.admin_options import ADMIN_HOST
from baton.services.runtime.net import format_address
from baton.services.runtime.settings import ServeSettings, is_loopback, is_wildcard


def banner(settings: ServeSettings, workers: Sequence[dict[str, Any]]) -> str:
    """``workers`` are rows of ``/v1/workers``."""
    host = "localhost" if is_wildcard(settings.host) else settings.host
    scheme = "http" if settings.ssl_certfile is None else "https"
    url = f"{scheme}://{format_address(host, settings.port)}"
    has_keys = settings.needs_key
    rows = [
        ("REST", f"{url}/v1  (OpenAI's API)   metrics {url}/metrics   workers {url}/v1/workers"),
        (
            "gRPC",
            f"{format_address(host, settings.grpc_port)}  (baton.api.inference.v1.InferenceService, with reflection)",
        ),
        (
            "model",
            f"{settings.served_model_name}  {_common(workers, 'kv_dtype')}  up to {_common(workers, 'max_model_len')} tokens",
        ),
        ("mode", settings.mode),
        *([("admin", _admin(settings))] if settings.admin_port is not None else []),
        *((worker["id"], _pool(worker)) for worker in workers),
        ("auth", "API key" if has_keys else "none: whoever reaches the port can use it"),
    ]
    rows.append(("TLS", _tls(settings)))
    if not is_loopback(settings.host) and settings.ssl_certfile is None:
        rows.append(("WARNING", f"insecure: listening on {settings.host} without TLS (--allow-insecure-bind)"))
    width = max(len(name) for name, _ in rows)
    lines = ["", "Baton is ready", *(f"  {name:<{width}}  {text}" for name, text in rows)]
    lines += [
        "",
        "Try it:",
        f"  {curl_line(url, str(settings.served_model_name), has_keys)}",
        "",
        "Ctrl-C drains and stops.",
        "",
    ]
    return "\n".join(lines)


def _tls(settings: ServeSettings) -> str:
    towards = "none" if settings.ssl_certfile is None else "yes"
    if settings.ssl_ca_certs is not None:
        towards = "mutual"
    return f"towards clients: {towards}; between processes: {'none' if settings.tls_ca_file is None else 'mutual'}"


def curl_line(url: str, model: str, has_keys: bool) -> str:
    """A streaming chat request that can be pasted into a shell."""
    question = "The code for amber fox is 4821. What is the code for amber fox?"
    body = {"model": model, "stream": True, "max_tokens": 32, "messages": [{"role": "user", "content": question}]}
    key = ' -H "authorization: Bearer $BATON_API_KEY"' if has_keys else ""
    return f"curl -N {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{json.dumps(body)}'"


def _admin(settings: ServeSettings) -> str:
    url = f"http://{format_address(ADMIN_HOST, settings.admin_port or 0)}"
    return f"{url}  (operators' routes: baton drain, role, blocks --url {url})"


def _pool(worker: dict[str, Any]) -> str:
    blocks, size = worker["kv_blocks"]["total"], worker["block_size"]
    return (
        f"{blocks:,} KV blocks x {size} tokens = {blocks * size:,} tokens   {worker['address']}   pid {worker['pid']}"
    )


def _common(workers: Sequence[dict[str, Any]], key: str) -> str:
    return ", ".join(
        sorted({f"{worker[key]:,}" if isinstance(worker[key], int) else str(worker[key]) for worker in workers})
    )
