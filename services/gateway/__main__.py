"""``baton gateway``."""

from __future__ import annotations

from baton.services.gateway.service import GatewayService
from baton.services.runtime.main import run_service
from baton.services.runtime.settings import GatewaySettings


def run(settings: GatewaySettings) -> int:
    """Serves until a signal and returns the exit status."""
    return run_service("gateway", settings, lambda: GatewayService(settings))
