"""Options of the admin listener, which is on loopback, always: to reach it from elsewhere one has to get onto the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from baton.services.runtime.option_set import OptionSet, readable

ADMIN_HOST = "127.0.0.1"
OptionalPort = Annotated[int | None, Field(ge=0, le=65535)]


class AdminOptions(OptionSet):
    """Where operators ask."""

    panel = "Admin listener"

    admin_port: OptionalPort = Field(
        None,
        description="Loopback port with the operators' routes. 0: any free one. Default: there is no such listener.",
    )
    admin_key_file: Path | None = Field(
        None,
        description="File with keys for it, one per line, plain or as sha256:HEX. Default: whoever reaches it may use it.",
    )

    @field_validator("admin_key_file")
    @classmethod
    def _check_admin_key_file(cls, path: Path | None) -> Path | None:
        return readable(path)
