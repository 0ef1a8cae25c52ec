"""How each family of models writes calls of tools."""

from __future__ import annotations

import re

from baton.services.gateway.tools.call_object import Outcome
from baton.services.gateway.tools.calls import CallArguments, CallStart
from baton.services.gateway.tools.json_scanner import JsonScanner, Scan
from baton.services.gateway.tools.section_parser import SectionParser, Step


class HermesParser(SectionParser):
    """Hermes, Qwen: each call an object between <tool_call> and </tool_call>."""

    marker = "<tool_call>"
    _close = "</tool_call>"

    def begin(self) -> None:
        self._num_closed: int | None = None  # characters of the closing marker, once the object is there

    def read(self, char: str) -> Step:
        if self._num_closed is None:
            if self.call is None and char.isspace():
                return Step.MORE
            outcome = self.read_call(char)
            if outcome is Outcome.CALL:
                self._num_closed = 0
            return Step.BAD if outcome is Outcome.NO_CALL else Step.MORE
        if not self._num_closed and char.isspace():
            return Step.MORE
        if char != self._close[self._num_closed]:
            return Step.BAD
        self._num_closed += 1
        return Step.END if self._num_closed == len(self._close) else Step.MORE


class Llama3JsonParser(SectionParser):
    """Llama 3: the whole answer is an object, or several with semicolons between them; <|python_tag|> may come first."""

    _tag = "<|python_tag|>"

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self._num_tagged = 0
        self._is_between = False
        self._has_separator = False

    def begin(self) -> None:
        raise AssertionError("the section begins with the text")

    def read(self, char: str) -> Step:
        if self.call is None:
            if char.isspace():
                return Step.MORE
            if self._is_between and char == ";" and not self._has_separator:
                self._has_separator = True
                return Step.MORE
            if not self._is_between and self._num_tagged < len(self._tag) and char == self._tag[self._num_tagged]:
                self._num_tagged += 1
                return Step.MORE
            if char != "{" or self._num_tagged not in (0, len(self._tag)):
                return Step.BAD
        outcome = self.read_call(char)
        if outcome is Outcome.CALL:
            self._is_between, self._has_separator = True, False
        return Step.BAD if outcome is Outcome.NO_CALL else Step.MORE


class MistralParser(SectionParser):
    """Mistral: [TOOL_CALLS] and a list of objects; or, since 2025, for each call [TOOL_CALLS]name[ARGS]{...}."""

    marker = "[TOOL_CALLS]"
    _head = re.compile(r"\s*([^\s\[{]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*")
    _max_head_chars = 256

    def begin(self) -> None:
        self._expects = "start"  # start, object, next, name, arguments
        self._name = ""
        self._arguments = JsonScanner()

    def read(self, char: str) -> Step:
        match self._expects:
            case "name":
                return self._read_name(char)
            case "arguments":
                return self._read_arguments(char)
        if self.call is None and char.isspace():
            return Step.MORE
        if self._expects == "start":
            if char != "[":
                self._expects = "name"
                return self._read_name(char)
            self._expects = "object"
            return Step.MORE
        if self._expects == "next":
            self._expects = "object"
            return Step.END if char == "]" else Step.MORE if char == "," else Step.BAD
        outcome = self.read_call(char)
        if outcome is Outcome.CALL:
            self._expects = "next"
        return Step.BAD if outcome is Outcome.NO_CALL else Step.MORE

    def _read_name(self, char: str) -> Step:
        if char != "{":
            self._name += char
            return Step.MORE if len(self._name) <= self._max_head_chars else Step.BAD
        head = self._head.fullmatch(self._name)
        if head is None or head[1] not in self.names:
            return Step.BAD
        self._expects = "arguments"
        self._arguments.feed(char)
        self.tell(CallStart(self.num_calls, head[1]), CallArguments(self.num_calls, char))
        self.num_calls += 1
        return Step.MORE

    def _read_arguments(self, char: str) -> Step:
        scan = self._arguments.feed(char)
        if scan is Scan.BAD:
            return Step.BAD
        self.tell(CallArguments(self.num_calls - 1, char))
        return Step.END if scan is Scan.DONE else Step.MORE
