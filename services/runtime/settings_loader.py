"""Flags, variables and a YAML file become one validated settings object, or a list of everything that is wrong with them."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from baton.services.core.errors import ConfigurationError
from baton.services.runtime.option_set import OptionSet

# Set by a supervisor: problems go into this file, so that it can say once what several children would all say.
PROBLEM_FILE_VARIABLE = "BATON_PROBLEM_FILE"

EXIT_BAD_CONFIGURATION = 2

_S = TypeVar("_S", bound=OptionSet)


class SettingsError(ConfigurationError):
    """Options that cannot be used: ``problems`` has one line for each, all of them."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


def flag_name(field: str) -> str:
    """``grpc_port`` -> ``--grpc-port``."""
    return "--" + field.replace("_", "-")


def load_settings(cls: type[_S], flags: Mapping[str, Any], config: Path | None = None) -> _S:
    """Flag > BATON_* variable > YAML key > default. ``flags`` has only what was given.

    Raises SettingsError that names every problem and where its value came from.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for name, value in _read_yaml(config, problems).items():
        values[name], origins[name] = value, f"{config}: {name}"
    for name, value in EnvSettingsSource(cls)().items():
        values[name], origins[name] = value, f"BATON_{name.upper()}"
    for name, value in flags.items():
        values[name], origins[name] = value, flag_name(name)
    try:
        settings = cls.model_validate(values)
    except ValidationError as error:
        problems += [_describe(cls, dict(details), origins) for details in error.errors(include_url=False)]
        raise SettingsError(problems) from None
    if problems:
        raise SettingsError(problems)
    return settings


def report_problems(command: str, error: ConfigurationError) -> int:
    """Writes one line per problem, for people, and returns the exit status."""
    problems = error.problems if isinstance(error, SettingsError) else (error.message,)
    text = "".join(f"{command}: {' '.join(problem.split())}\n" for problem in problems)
    problem_file = os.environ.get(PROBLEM_FILE_VARIABLE)
    if problem_file:
        Path(problem_file).write_text(text, encoding="utf-8")
    else:
        sys.stderr.write(text)
        sys.stderr.flush()
    return EXIT_BAD_CONFIGURATION


def closest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _read_yaml(path: Path | None, problems: list[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"--config: cannot read {path}: {error.strerror}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not YAML: {error}")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path}: must hold options as 'name: value' lines")
        return {}
    # None is what an empty value reads as: the option is not set.
    return {str(key).replace("-", "_"): value for key, value in content.items() if value is not None}


def _describe(cls: type[OptionSet], details: dict[str, Any], origins: Mapping[str, str]) -> str:
    name = str(details["loc"][0])
    origin = origins.get(name, flag_name(name))
    if details["type"] == "extra_forbidden":
        return f"{origin}: no such option{closest(name, cls.model_fields)}"
    message = str(details["msg"])
    if details["type"] == "value_error":
        return f"{origin}: {message.removeprefix('Value error, ')}"
    given = "" if "api_key" in name else f", got {_shorten(details['input'])}"
    return f"{origin}: {message[0].lower()}{message[1:]}{given}"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
