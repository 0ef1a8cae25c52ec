"""One call as most models write it: {"name": ..., "arguments": {...}}, read character by character."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

import orjson

from baton.services.gateway.tools.calls import CallArguments, CallStart, Piece
from baton.services.gateway.tools.json_scanner import JsonScanner, Scan

_ARGUMENT_KEYS = ("arguments", "parameters")
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')


class Outcome(Enum):
    """What the characters so far are."""

    MORE = "more"
    CALL = "call"  # a whole call
    NO_CALL = "no_call"  # and cannot become one


class CallObject:
    """Arguments are told as they come once the object begins with the name of a known tool, and else at its end.

    A call that was told of and goes on with something that is no JSON stays cut there.
    """

    def __init__(self, index: int, names: frozenset[str]) -> None:
        self._index = index
        self._names = names
        self._pieces: list[Piece] = []
        self._whole = JsonScanner()
        self._arguments: JsonScanner | None = None  # of the object of arguments, while it is told
        self._has_tried = False
        self._text: list[str] = []
        self.is_started = False

    def take(self) -> list[Piece]:
        """What has become certain."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def feed(self, char: str) -> Outcome:
        scan = self._whole.feed(char)
        self._text.append(char)
        if scan is Scan.BAD or (len(self._text) == 1 and char != "{"):
            return Outcome.NO_CALL
        if self._arguments is not None:
            self._pieces.append(CallArguments(self._index, char))
            if self._arguments.feed(char) is Scan.DONE:
                self._arguments = None
        elif not self._has_tried and self._whole.depth == 2:
            self._has_tried = True
            self._try_to_start()
        if scan is Scan.MORE:
            return Outcome.MORE
        return Outcome.CALL if self.is_started or self._take_whole() else Outcome.NO_CALL

    def _try_to_start(self) -> None:
        head = _HEAD.fullmatch("".join(self._text))
        name = None if head is None else _loads(head[1])
        if name in self._names:
            self.is_started = True
            self._arguments = JsonScanner()
            self._arguments.feed("{")
            self._pieces += [CallStart(self._index, name), CallArguments(self._index, "{")]

    def _take_whole(self) -> bool:
        """For keys in another order, and arguments that are absent, or JSON in a string."""
        value = _loads("".join(self._text))
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return False
        arguments: Any = next((value[key] for key in _ARGUMENT_KEYS if key in value), {})
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        if not isinstance(arguments, dict):
            return False
        self.is_started = True
        text = orjson.dumps(arguments).decode()
        self._pieces += [CallStart(self._index, value["name"]), CallArguments(self._index, text)]
        return True


def _loads(text: str) -> Any:
    try:
        return orjson.loads(text)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return None
