"""Which model is meant: the bundled one unless the user names another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from baton.services.runtime.settings import GatewaySettings, ServeSettings, WorkerSettings
from baton.services.runtime.settings_loader import SettingsError

BUNDLED_MODEL_NAME = "baton-demo"
BUNDLED_MODEL = Path(__file__).with_name("demo_model")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_S = TypeVar("_S", GatewaySettings, WorkerSettings, ServeSettings)


def with_model(settings: _S) -> _S:
    """``settings`` with ``model`` and ``served_model_name`` filled in.

    Raises SettingsError for a folder that is not there; what is inside is the engine's to judge.
    """
    if settings.model is None:
        name = settings.served_model_name or BUNDLED_MODEL_NAME
        return settings.model_copy(update={"model": str(BUNDLED_MODEL), "served_model_name": name})
    path = Path(settings.model).expanduser()
    if path.is_dir():
        model, name = str(path.resolve()), path.resolve().name
    elif _HUB_ID.fullmatch(settings.model) and not settings.model.startswith("."):
        model = name = settings.model
    else:
        raise SettingsError([f"--model: no such folder: {settings.model}"])
    return settings.model_copy(update={"model": model, "served_model_name": settings.served_model_name or name})
