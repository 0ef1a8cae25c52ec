"""Where a JSON value ends, found character by character. Pure, and strict: what it lets through parses."""

from __future__ import annotations

from enum import Enum

_SPACE = " \t\n\r"
_ESCAPES = '"\\/bfnrt'
_HEX = "0123456789abcdefABCDEF"
_WORDS = ("true", "false", "null")
MAX_DEPTH = 200


class Scan(Enum):
    """What a character did."""

    MORE = "more"  # the value goes on
    DONE = "done"  # it ended with this character
    BAD = "bad"  # no JSON value goes on like this


class JsonScanner:
    """One value, which must be an object or a list."""

    def __init__(self) -> None:
        self._open: list[str] = []  # "{" or "["
        self._expects = "value"  # value, key, first_key, first_item, colon, next, string, escape, hex, number, word
        self._is_key = False  # the string under way
        self._num_hex = 0
        self._text = ""  # of the number or word under way

    @property
    def depth(self) -> int:
        """Objects and lists that are open."""
        return len(self._open)

    def feed(self, char: str) -> Scan:
        """Takes the next character."""
        match self._expects:
            case "string":
                return self._string(char)
            case "escape":
                self._num_hex = 4
                self._expects = "hex" if char == "u" else "string"
                return Scan.MORE if char == "u" or char in _ESCAPES else Scan.BAD
            case "hex":
                self._num_hex -= 1
                if not self._num_hex:
                    self._expects = "string"
                return Scan.MORE if char in _HEX else Scan.BAD
            case "number":
                return self._number(char)
            case "word":
                return self._word(char)
            case _:
                return Scan.MORE if char in _SPACE else self._between(char)

    def _string(self, char: str) -> Scan:
        if char == "\\":
            self._expects = "escape"
        elif char == '"':
            self._expects = "colon" if self._is_key else "next"
        elif char < " ":
            return Scan.BAD
        return Scan.MORE

    def _number(self, char: str) -> Scan:
        if char in "0123456789+-.eE":
            self._text += char
            return Scan.MORE
        if not _is_number(self._text):
            return Scan.BAD
        self._expects = "next"
        return Scan.MORE if char in _SPACE else self._between(char)

    def _word(self, char: str) -> Scan:
        self._text += char
        if self._text in _WORDS:
            self._expects = "next"
            return Scan.MORE
        return Scan.MORE if any(word.startswith(self._text) for word in _WORDS) else Scan.BAD

    def _between(self, char: str) -> Scan:
        expects = self._expects
        if expects == "colon":
            self._expects = "value"
            return Scan.MORE if char == ":" else Scan.BAD
        if char == '"' and expects in ("key", "first_key", "value", "first_item"):
            if not self._open:
                return Scan.BAD
            self._is_key = expects in ("key", "first_key")
            self._expects = "string"
            return Scan.MORE
        if char == "}" and expects in ("first_key", "next") and self._open[-1] == "{":
            return self._close()
        if char == "]" and expects in ("first_item", "next") and self._open[-1] == "[":
            return self._close()
        if char == "," and expects == "next":
            self._expects = "key" if self._open[-1] == "{" else "value"
            return Scan.MORE
        if expects not in ("value", "first_item"):
            return Scan.BAD
        return self._value(char)

    def _value(self, char: str) -> Scan:
        if char in "{[":
            if len(self._open) >= MAX_DEPTH:
                return Scan.BAD
            self._open.append(char)
            self._expects = "first_key" if char == "{" else "first_item"
            return Scan.MORE
        if not self._open or char not in "-0123456789tfn":
            return Scan.BAD
        self._text = char
        self._expects = "word" if char in "tfn" else "number"
        return Scan.MORE

    def _close(self) -> Scan:
        self._open.pop()
        self._expects = "next"
        return Scan.MORE if self._open else Scan.DONE


def _is_number(text: str) -> bool:
    """RFC 8259: no leading zeros, digits on both sides of a point."""
    digits = text.removeprefix("-")
    mantissa, _, exponent = digits.replace("E", "e").partition("e")
    whole, point, fraction = mantissa.partition(".")
    if not whole.isdecimal() or not whole.isascii() or (len(whole) > 1 and whole[0] == "0"):
        return False
    if point and not (fraction.isdecimal() and fraction.isascii()):
        return False
    if "e" not in digits.lower():
        return True
    exponent = exponent[1:] if exponent[:1] in ("+", "-") else exponent
    return exponent.isdecimal() and exponent.isascii()
