"""What every set of options is made of: where its values come from, and the kinds of value that need a word of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ByteSize, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _split_commas(value: Any) -> Any:
    """A variable holds a list as comma-separated text; flags and YAML give lists."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _positive_size(value: Any) -> Any:
    if str(value).strip().startswith("-") or str(value).strip() == "0":
        raise ValueError(f"must be above 0, for example 512MiB or 1GiB, got {value}")
    return value


StringList = Annotated[list[str], NoDecode, BeforeValidator(_split_commas)]
SecretList = Annotated[list[SecretStr], NoDecode, BeforeValidator(_split_commas)]
PathList = Annotated[list[Path], NoDecode, BeforeValidator(_split_commas)]
Size = Annotated[ByteSize, BeforeValidator(_positive_size)]
Port = Annotated[int, Field(ge=0, le=65535)]
PublicPort = Annotated[int | None, Field(ge=1, le=65535)]


class OptionSet(BaseSettings):
    """Options of a command. Those of our processes have ``Settings`` in common."""

    model_config = SettingsConfigDict(
        env_prefix="BATON_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
    )
    # Fields that --help does not show: one command sets them for another.
    hidden: ClassVar[frozenset[str]] = frozenset()
    # Heading above this class's own fields in --help.
    panel: ClassVar[str] = "Options"


def readable(path: Path | None) -> Path | None:
    """``path``. Raises ValueError where there is no such file, or none that may be read."""
    if path is not None:
        try:
            path.open("rb").close()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
    return path
