"""Calls as Python would write them, in a list: [get_weather(city="Oslo", days=2), now()]. Nothing is ever run."""

from __future__ import annotations

import re
from typing import Any

import orjson

from baton.services.gateway.tools.section_parser import SectionParser, Step

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.])")
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_WORD = re.compile(r"[A-Za-z]+")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_ESCAPES |= {char: char for char in "\\'\"/"}
_HEX = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})")
MAX_DEPTH = 50
_MAX_NAME_CHARS = 256


class NotLiteralError(ValueError):
    """The text is not what it should be."""


class PythonicParser(SectionParser):
    """Llama 3.2 and 4, and others: the whole answer is such a list. A call is told when its parenthesis closes."""

    _tags = ("<|python_start|>", "<|python_end|>")

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self._expects = "start"  # start, name, call, next, end
        self._source: list[str] = []  # of the call under way, from its name on
        self._num_open = 0
        self._quote = ""
        self._is_escaped = False
        self._tag = ""

    def begin(self) -> None:
        raise AssertionError("the section begins with the text")

    def read(self, char: str) -> Step:
        match self._expects:
            case "call":
                return self._read_call(char)
            case "name" if not (char.isspace() and not self._source):
                return self._read_name(char)
            case "start":
                return self._read_start(char)
            case "next" if not char.isspace():
                self._expects = {"]": "end", ",": "name"}.get(char, "bad")
                if self._expects == "end":
                    self.tell()  # the list is whole: what follows is text, or the closing tag
                return Step.BAD if self._expects == "bad" else Step.MORE
            case "end":
                return self._read_end(char)
        return Step.MORE

    def _read_start(self, char: str) -> Step:
        if char == "[" and self._tag in ("", self._tags[0]):
            self._expects = "name"
            return Step.MORE
        if char.isspace() and self._tag in ("", self._tags[0]):
            return Step.MORE
        self._tag += char
        return Step.MORE if self._tags[0].startswith(self._tag) else Step.BAD

    def _read_end(self, char: str) -> Step:
        if char.isspace() and self._tag in ("", *self._tags):
            return Step.MORE
        if self._tag == self._tags[0]:
            self._tag = ""
        self._tag += char
        if not self._tags[1].startswith(self._tag):
            return Step.BAD
        return Step.END if self._tag == self._tags[1] else Step.MORE

    def _read_name(self, char: str) -> Step:
        self._source.append(char)
        if char != "(":
            return Step.MORE if len(self._source) <= _MAX_NAME_CHARS else Step.BAD
        if "".join(self._source[:-1]).strip() not in self.names:
            return Step.BAD
        self._expects, self._num_open = "call", 1
        return Step.MORE

    def _read_call(self, char: str) -> Step:
        self._source.append(char)
        if self._is_escaped:
            self._is_escaped = False
        elif self._quote:
            self._is_escaped = char == "\\"
            if char == self._quote:
                self._quote = ""
        elif char in "'\"":
            self._quote = char
        elif char in "([{":
            self._num_open += 1
        elif char in ")]}":
            self._num_open -= 1
            if not self._num_open:
                return self._end_call()
        return Step.MORE

    def _end_call(self) -> Step:
        source = "".join(self._source)
        name, _, arguments = source.partition("(")
        try:
            values = parse_keyword_arguments(arguments[:-1])
            text = orjson.dumps(values).decode()
        except (NotLiteralError, TypeError):
            return Step.BAD
        self.tell_call(name.strip(), text)
        self._source.clear()
        self._expects = "next"
        return Step.MORE


def parse_keyword_arguments(text: str) -> dict[str, Any]:
    """``a=1, b=[True, "x"]`` as a dictionary. Raises NotLiteralError."""
    reader, values = _Reader(text), dict[str, Any]()
    while not reader.is_at_end():
        name = reader.match(_NAME)
        reader.expect("=")
        if name in values:
            raise NotLiteralError(name)
        values[name] = reader.value(0)
        if not reader.is_at_end():
            reader.expect(",")
    return values


class _Reader:
    """Python's literals: strings, numbers, True, False, None, lists, tuples, dictionaries with strings as keys."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def is_at_end(self) -> bool:
        return not self._peek()

    def _peek(self) -> str:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._text[self._at : self._at + 1]

    def expect(self, char: str) -> None:
        if self._peek() != char:
            raise NotLiteralError(char)
        self._at += 1

    def match(self, pattern: re.Pattern[str]) -> str:
        self._peek()
        found = pattern.match(self._text, self._at)
        if found is None:
            raise NotLiteralError(pattern.pattern)
        self._at = found.end()
        return found[0]

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise NotLiteralError("too deep")
        char = self._peek()
        if char in ("'", '"'):
            return self._string(char)
        if char == "[":
            return self._items("]", depth)
        if char == "(":
            return self._items(")", depth)
        if char == "{":
            return self._dictionary(depth)
        if char == "-" or char.isdigit():
            number = self.match(_NUMBER)
            return float(number) if any(mark in number for mark in ".eE") else int(number)
        word = self.match(_WORD)
        if word not in _WORDS:
            raise NotLiteralError(word)
        return _WORDS[word]

    def _items(self, end: str, depth: int) -> list[Any]:
        self._at += 1
        items: list[Any] = []
        while self._peek() != end:
            items.append(self.value(depth + 1))
            if self._peek() != end:
                self.expect(",")
        self._at += 1
        return items

    def _dictionary(self, depth: int) -> dict[str, Any]:
        self._at += 1
        values: dict[str, Any] = {}
        while (char := self._peek()) != "}":
            if char not in ("'", '"'):
                raise NotLiteralError("a key")
            key = self._string(char)
            self.expect(":")
            values[key] = self.value(depth + 1)
            if self._peek() != "}":
                self.expect(",")
        self._at += 1
        return values

    def _string(self, quote: str) -> str:
        self._at += 1
        parts: list[str] = []
        while True:
            char = self._text[self._at : self._at + 1]
            self._at += 1
            if char == quote:
                return "".join(parts)
            if not char:
                raise NotLiteralError("the string does not end")
            parts.append(self._escape() if char == "\\" else char)

    def _escape(self) -> str:
        code = _HEX.match(self._text, self._at)
        if code is not None:
            self._at = code.end()
            number = int(code[1] or code[2] or code[3], 16)
            if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
                raise NotLiteralError("no character")
            return chr(number)
        char = self._text[self._at : self._at + 1]
        self._at += 1
        return _ESCAPES.get(char, "\\" + char)
