"""What an output must match, as workers get it: llguidance's JSON of grammars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

# Text that a grammar leaves no choice about must not be worked out ahead: of some grammars (/a+/ twice in a row) it has no end.
_START = '%%llguidance {"no_forcing": true}\nstart: @%s'


@dataclass(frozen=True, slots=True)
class Grammar:
    """Grammars that refer to each other; the first is what the output must match. ``param``: the field that asked for it."""

    param: str
    parts: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        return str(self.parts[0]["name"])

    @property
    def text(self) -> str:
        """As workers get it."""
        return orjson.dumps(
            {"grammars": [{"name": "baton_start", "lark_grammar": _START % self.name}, *self.parts]}
        ).decode()

    def behind(self, name: str, rules: str, *others: Grammar) -> Grammar:
        """A grammar whose first part is ``rules`` (Lark, with a start rule), which may name this one and ``others``."""
        parts = [part for grammar in (self, *others) for part in grammar.parts]
        return Grammar(self.param, ({"name": name, "lark_grammar": rules}, *parts))
