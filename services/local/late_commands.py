"""Commands that live in layers above this one, found by name when they are asked for.

``baton`` is one command, but its code is in layers: ``baton.load`` may use everything here, and nothing here may import it.
So it is named, as an entry point of another package would be, and loaded by nobody who does not use it.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from typer.core import TyperGroup

# Command -> the function that makes it.
LATE_COMMANDS = {"bench": "baton.load.generator.command:bench_command"}


class LateGroup(TyperGroup):
    """A group of commands with the late ones behind its own."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *LATE_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in LATE_COMMANDS:
            return pkgutil.resolve_name(LATE_COMMANDS[cmd_name])()
        return super().get_command(ctx, cmd_name)
