"""Commands whose options are the fields of a settings class, so that flags, variables, YAML keys and help cannot differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from baton.services.runtime.option_set import OptionSet
from baton.services.runtime.settings import Settings
from baton.services.runtime.settings_loader import SettingsError, closest, flag_name, load_settings

_S = TypeVar("_S", bound=OptionSet)

_UNKNOWN = {"ignore_unknown_options": True, "allow_extra_args": True}


def add_settings_command(
    app: typer.Typer,
    name: str,
    cls: type[_S],
    run: Callable[[_S], int],
    *,
    help_text: str,
    fixed: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Adds ``baton NAME``. ``fixed`` fields have no option; ``defaults`` replace the class's.

    All values reach the settings class as text, so that every bad one is reported, not only the first.
    """
    fixed, defaults = fixed or {}, defaults or {}

    def command(ctx: typer.Context, **options: Any) -> int:
        config = options.pop("config")
        given = {option: value for option, value in options.items() if value not in (None, [], ())}
        problems = list(_unknown_options(ctx.args, [flag_name(option) for option in (*options, "config")]))
        try:
            settings = load_settings(cls, {**defaults, **given, **fixed}, config)
        except SettingsError as error:
            raise SettingsError([*problems, *error.problems]) from None
        if problems:
            raise SettingsError(problems)
        return run(settings)

    parameters = [inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    # Certificates are declared first, since other options are checked against them, and shown last.
    for field_name, field in sorted(cls.model_fields.items(), key=lambda item: _panel(cls, item[0]).startswith("TLS")):
        if field_name not in fixed:
            parameters.append(_parameter(cls, field_name, field))
    parameters.append(
        _keyword("config", Path | None, typer.Option("--config", metavar="FILE", help="YAML file with these options."))
    )
    # Typer reads the signature to find the options.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=help_text, context_settings=_UNKNOWN)(command)


def flags_for(cls: type[Settings], source: Settings, **values: Any) -> list[str]:
    """Command line flags that give ``cls`` what ``source`` and ``values`` hold, for a child process.

    Lists are left out, except those of paths: the others are secrets, which go by file.
    """
    flags: list[str] = []
    for name in cls.model_fields:
        value = values.get(name, getattr(source, name, None))
        if isinstance(value, (list, tuple)):
            flags += [part for path in value if isinstance(path, Path) for part in (flag_name(name), str(path))]
        elif value is None:
            continue
        elif isinstance(value, bool):
            flags.append(flag_name(name) if value else "--no-" + flag_name(name)[2:])
        else:
            flags += [flag_name(name), str(value)]
    return flags


def _unknown_options(extra: list[str], known: list[str]) -> Iterator[str]:
    follows_unknown = False
    for argument in extra:
        if argument.startswith("-"):
            option = argument.split("=")[0]
            yield f"{option}: no such option{closest(option, known)}"
            follows_unknown = "=" not in argument
        else:
            if not follows_unknown:  # else probably its value
                yield f"{argument}: unexpected argument"
            follows_unknown = False


def _parameter(cls: type[OptionSet], name: str, field: FieldInfo) -> inspect.Parameter:
    kind = field.annotation
    flag = flag_name(name)
    shown: dict[str, Any] = {
        "help": _help_text(field),
        "hidden": name in cls.hidden,
        "rich_help_panel": _panel(cls, name),
    }
    if kind is bool:
        return _keyword(name, bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", metavar="", **shown))
    if get_origin(kind) is list:
        return _keyword(name, list[str] | None, typer.Option(flag, metavar=name.split("_")[-1].upper(), **shown))
    return _keyword(name, str | None, typer.Option(flag, metavar=_metavar(name, kind), **shown))


def _panel(cls: type[OptionSet], name: str) -> str:
    """The heading of the class that declares the field last."""
    bases = (base for base in cls.__mro__ if issubclass(base, OptionSet))
    return next(base.panel for base in bases if name in inspect.get_annotations(base))


def _keyword(name: str, annotation: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def _metavar(name: str, kind: Any) -> str:
    kinds = [kind, *get_args(kind)]
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    for choice in kinds:
        if inspect.isclass(choice) and issubclass(choice, Enum):
            return "|".join(str(member.value) for member in choice)
    if int in kinds:
        return "N"
    if float in kinds:
        return "SECONDS" if name.endswith("_s") else "NUMBER"
    if Path in kinds:
        return "FILE"
    return "SIZE" if getattr(kind, "__name__", "") == "ByteSize" else "TEXT"


def _help_text(field: FieldInfo) -> str:
    value = field.default
    if field.is_required() or value in (None, [], ()):
        return field.description or ""
    if hasattr(value, "human_readable"):
        value = value.human_readable().replace(".0", "")
    elif isinstance(value, bool):
        value = "on" if value else "off"
    return f"{field.description} Default: {value}."
