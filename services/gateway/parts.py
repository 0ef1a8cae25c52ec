"""What a chat choice says, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from baton.services.gateway.tools.calls import CallArguments, Text


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a tool begins; its arguments follow."""

    index: int
    call_id: str
    name: str


Part: TypeAlias = Thought | Text | CallBegin | CallArguments
