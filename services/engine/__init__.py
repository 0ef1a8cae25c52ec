"""Models, weights, paged KV cache, sampling: everything between a schedule and its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton.services.engine.config import GenerationDefaults, ModelConfig
    from baton.services.engine.engine import Engine, set_num_threads
    from baton.services.engine.kv_cache import KVCacheShape
    from baton.services.engine.loader import LoadedModel, load_model

_HOMES = {
    "Engine": "engine",
    "GenerationDefaults": "config",
    "KVCacheShape": "kv_cache",
    "LoadedModel": "loader",
    "ModelConfig": "config",
    "load_model": "loader",
    "set_num_threads": "engine",
}

__all__ = [
    "Engine",
    "GenerationDefaults",
    "KVCacheShape",
    "LoadedModel",
    "ModelConfig",
    "load_model",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    """Import on first use: a process that only reads configs should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
