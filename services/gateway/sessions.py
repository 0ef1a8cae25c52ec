"""Which conversation a request is a turn of, and how long its blocks are to be kept, from the words of the three APIs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from baton.services.core.sessions import SessionTag
from baton.services.core.tenants import Tenant
from baton.services.gateway.anthropic_models import MessagesBody
from baton.services.gateway.options import Caller, GenerationOptions
from baton.services.gateway.validation import MAX_SESSION_ID_CHARS, check_length, invalid

SESSION_HEADER = "x-session-id"
# Anthropic's words for how long.
_TTLS_S = {"5m": 300.0, "1h": 3600.0}


def header_session_id(headers: Mapping[str, str]) -> str | None:
    """The conversation that a header names. Raises INVALID_REQUEST."""
    session_id = headers.get(SESSION_HEADER)
    check_length(SESSION_HEADER, session_id, MAX_SESSION_ID_CHARS)
    return session_id


def session_key(tenant: Tenant, session_id: str) -> str:
    """What workers call it: tenants choose names apart from each other. A tenant is hex, so the first "/" ends it."""
    return f"{tenant.tenant_id}/{session_id}"


def session_tag(options: GenerationOptions, caller: Caller) -> SessionTag | None:
    """What the body names wins over the header. None: a request of no conversation, whose blocks nobody keeps."""
    session_id = options.session_id or caller.session_id
    return None if session_id is None else SessionTag(session_key(caller.tenant, session_id), options.session_ttl_s)


def asked_ttl_s(body: MessagesBody) -> float | None:
    """The longest that a ``cache_control`` asks for; None without one. Raises INVALID_REQUEST."""
    return max((_ttl_s(path, control) for path, control in _controls(body)), default=None)


def _controls(body: MessagesBody) -> Iterator[tuple[str, Any]]:
    if body.cache_control is not None:
        yield "cache_control", body.cache_control
    lists: list[tuple[str, Any]] = [("system", body.system), ("tools", body.tools)]
    lists += [(f"messages[{i}].content", message.get("content")) for i, message in enumerate(body.messages)]
    for path, blocks in lists:
        for i, block in enumerate(blocks if isinstance(blocks, list) else ()):
            if isinstance(block, dict) and block.get("cache_control") is not None:
                yield f"{path}[{i}].cache_control", block["cache_control"]


def _ttl_s(path: str, control: Any) -> float:
    if not isinstance(control, dict) or control.get("type") != "ephemeral":
        raise invalid(f"{path}.type", 'must be "ephemeral"')
    ttl = control.get("ttl") or "5m"
    if not isinstance(ttl, str) or ttl not in _TTLS_S:
        raise invalid(f"{path}.ttl", 'must be "5m" or "1h"')
    return _TTLS_S[ttl]
