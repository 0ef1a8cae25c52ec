"""Typed, bounded reading of the JSON files of a model folder.

A model folder comes from anybody. Nothing in it is executed, every number has bounds, and a refusal names the file, the
field and the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from baton.services.core.errors import ConfigurationError

MAX_JSON_BYTES = 256 << 20  # tokenizer.json of the largest vocabularies has 30 MB


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object in ``path``. Raises ConfigurationError for anything else."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ConfigurationError(f"{path}: {size} bytes, expected at most {MAX_JSON_BYTES}")
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError covers broken JSON and broken UTF-8
        raise ConfigurationError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


class ConfigFile:
    """One JSON object whose fields are read by type and range. A null field counts as absent, as in transformers."""

    __slots__ = ("_path", "_prefix", "_values")

    def __init__(self, values: Mapping[str, object], path: Path, prefix: str = "") -> None:
        self._values = values
        self._path = path
        self._prefix = prefix  # of nested objects, for messages: "rope_scaling."

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        return cls(read_json_object(path), path)

    def __contains__(self, field: str) -> bool:
        return self._values.get(field) is not None

    def fail(self, field: str, expected: str) -> ConfigurationError:
        """The error for a field with the wrong value."""
        value = self._values.get(field)
        found = "nothing" if value is None else _shorten(value)
        return ConfigurationError(f"{self._path}: {self._prefix}{field}: expected {expected}, found {found}")

    def integer(self, field: str, *, default: int | None = None, minimum: int = 1, maximum: int = 1 << 31) -> int:
        value = self._values.get(field)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.fail(field, f"an integer from {minimum} to {maximum}")
        return value

    def optional_integer(self, field: str, *, minimum: int = 1, maximum: int = 1 << 31) -> int | None:
        return self.integer(field, minimum=minimum, maximum=maximum) if field in self else None

    def number(
        self, field: str, *, default: float | None = None, minimum: float = -math.inf, maximum: float = math.inf
    ) -> float:
        value = self._values.get(field)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= maximum:
            raise self.fail(field, f"a number from {minimum:g} to {maximum:g}")  # NaN compares false: refused too
        return float(value)

    def optional_number(self, field: str, *, minimum: float = -math.inf, maximum: float = math.inf) -> float | None:
        return self.number(field, minimum=minimum, maximum=maximum) if field in self else None

    def boolean(self, field: str, *, default: bool) -> bool:
        value = self._values.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(field, "true or false")
        return value

    def string(self, field: str, *, default: str | None = None) -> str:
        value = self._values.get(field)
        if value is None:
            value = default
        if not isinstance(value, str):
            raise self.fail(field, "a string")
        return value

    def choice(self, field: str, allowed: frozenset[str], *, default: str) -> str:
        value = self.string(field, default=default)
        if value not in allowed:
            raise self.fail(field, f"one of {', '.join(sorted(allowed))}")
        return value

    def strings(self, field: str) -> tuple[str, ...] | None:
        value = self._values.get(field)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(field, "a list of strings")
        return tuple(value)

    def token_ids(self, field: str) -> tuple[int, ...] | None:
        """A token id or a list of them; None when absent."""
        value = self._values.get(field)
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int):
                raise self.fail(field, "a token id or a list of token ids")
        return tuple(items)

    def section(self, field: str) -> ConfigFile | None:
        """A nested object; None when absent."""
        value = self._values.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(field, "an object")
        return ConfigFile(value, self._path, f"{self._prefix}{field}.")

    def require(self, field: str, expected: object) -> None:
        """Refuse a switch of the architecture that is not set as this program computes it. Absent is fine."""
        value = self._values.get(field)
        if value is not None and value != expected:
            raise self.fail(field, f"{expected!r} (nothing else is supported)")


def _shorten(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
