"""Schemas, expressions and grammars that somebody could send to do harm, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

_TYPES = ["object", "array", "string", "number", "integer", "boolean", "null", "foo", 5, None, ["string", "null"], []]
_SIZES = [0, 1, -1, 3, 50, 1000, 10**6, 10**9, 2**63, -(2**63), 10**30, 1.5, "7", None]
_ATOMS = [
    "a",
    ".",
    "[a-z]",
    r"\w",
    r"\d",
    r"\s",
    "[^x]",
    r"\u{1F600}",
    "é",
    "(?i:k)",
    r"\p{L}",
    "[\\x00-\\x{10FFFF}]",
    "(?=a)",
    r"\1",
]
_ATOMS += ["(?<n>b)", "$", "^", r"\b", "[", "(", ")", "*", r"\Q", "\x00", "/", "\\"]
_REPEATS = ["*", "+", "?", "{0,3}", "{7}", "{1,1000}", "{500,100000}", "{99999999}", "*?", "++", "{,}", "{2,1}"]

_ELSEWHERE = ["http://127.0.0.1/x", "file:///etc/passwd", 5, "%"]


def hostile_fields(seed: int) -> dict[str, Any]:
    """Fields of a chat request: one of the ways to ask for a grammar, with something hostile in it."""
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random], dict[str, Any]]] = [
        lambda rng: _format(_schema(rng, 0)),
        lambda rng: _format(_large_schema(rng), strict=rng.random() < 0.5),
        lambda rng: {"structured_outputs": {"json": _schema(rng, 0)}},
        lambda rng: {"structured_outputs": {"regex": _regex(rng, 0)}},
        lambda rng: {"structured_outputs": {"regex": _large_regex(rng)}},
        lambda rng: {"structured_outputs": {"grammar": _lark(rng)}},
        lambda rng: {"structured_outputs": {"grammar": _large_lark(rng)}},
        lambda rng: {"structured_outputs": {"choice": _choices(rng)}},
        lambda rng: {"structured_outputs": _junk(rng)},
        lambda rng: {"response_format": _junk(rng)},
        _tools,
    ]
    return rng.choice(kinds)(rng)


def _format(schema: Any, strict: bool = False) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
    }


def _tools(rng: random.Random) -> dict[str, Any]:
    schema = _large_schema(rng) if rng.random() < 0.4 else _schema(rng, 0)
    function = {"name": "f", "parameters": schema, "strict": rng.random() < 0.5}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": rng.choice(["required", "auto"])}


def _schema(rng: random.Random, depth: int) -> Any:
    if depth > 5 or rng.random() < 0.05:
        return rng.choice([True, False, {}, {"type": "string"}, None, [], "x", 1])
    schema: dict[str, Any] = {}
    if rng.random() < 0.7:
        schema["type"] = rng.choice(_TYPES if rng.random() < 0.3 else _TYPES[:7])
    for _ in range(rng.randrange(4)):
        name = rng.choice(list(_KEYWORDS))
        schema[name] = _KEYWORDS[name](rng, depth)
    if depth == 0 and rng.random() < 0.5:
        schema["$defs"] = {name: _schema(rng, 2) for name in "ab"}
    return schema


def _schemas(rng: random.Random, depth: int) -> list[Any]:
    return [_schema(rng, depth + 1) for _ in range(rng.randrange(5))]


def _named(rng: random.Random, depth: int) -> dict[str, Any]:
    return {rng.choice(["a", "b", "", "é", 'q"', "x" * 300]): _schema(rng, depth + 1) for _ in range(rng.randrange(5))}


def _size(rng: random.Random, depth: int) -> Any:
    size = rng.choice(_SIZES)
    return size if not isinstance(size, int) or -(2**63) <= size < 2**64 else float(size)


_KEYWORDS: dict[str, Callable[[random.Random, int], Any]] = {
    **dict.fromkeys(("properties", "patternProperties", "definitions", "dependentSchemas"), _named),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), _schemas),
    **dict.fromkeys(
        ("items", "additionalProperties", "not", "if", "then", "contains", "propertyNames"), lambda r, d: _schema(r, d + 1)
    ),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum"), _size),
    **dict.fromkeys(("multipleOf", "minProperties"), _size),
    "pattern": lambda rng, depth: _regex(rng, depth),
    "format": lambda rng, depth: rng.choice(["date-time", "uri", "regex", "nonsense", "", 5]),
    "enum": lambda rng, depth: [rng.choice([1, "a", None, [1], {"a": 2}, "x" * 2000]) for _ in range(rng.randrange(6))],
    "const": lambda rng, depth: rng.choice([1, "a", None, {"a": [None]}]),
    "required": lambda rng, depth: rng.choice([["a"], ["a", "b", "zz"], [5], "a", []]),
    "$ref": lambda rng, depth: rng.choice(["#", "#/$defs/a", "#/$defs/b", "#/nope", *_ELSEWHERE]),
    "x-guidance": lambda rng, depth: {"whitespace_pattern": _regex(rng, depth)},
}  # fmt: skip


def _large_schema(rng: random.Random) -> dict[str, Any]:
    """One idea, taken far."""
    many, few = rng.choice([200, 1000, 3000]), rng.choice([8, 15, 25])
    text = {
        "type": "string",
        "pattern": rng.choice(["^(a|b)*c{5,40}$", "(.*x){3}.{8}", "^([a-z]+)+$", r"^\w{1,200}\W{1,200}$"]),
    }
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(rng.choice([30, 90, 99, 140])):
        nested = (
            {"type": "object", "properties": {"a": nested}}
            if rng.random() < 0.5
            else {"anyOf": [nested, {"type": "null"}]}
        )
    return rng.choice(
        [
            {"enum": [f"{rng.getrandbits(60):x}" for _ in range(many * 4)]},
            {"type": "object", "properties": {f"p{i}": text for i in range(many)}},
            {"type": "object", "properties": {f"p{i}": {} for i in range(many)}, "required": [f"p{i}" for i in range(many)]},
            {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": text}} for j in range(few)]} for i in range(few)]},
            {"anyOf": [{"type": "object", "properties": {"a": {"const": i}}, "required": ["a"]} for i in range(many)]},
            _chained(many, lambda below: {"type": "array", "items": below}, {}),
            _chained(few, lambda below: {"anyOf": [below, below]}, {}),
            _chained(few, lambda below: {"allOf": [below, below]}, text),
            {"type": "array", "minItems": rng.choice([5, 10**4, 10**7]), "items": {"minItems": 10**4, "items": text}},
            {"type": "string", "minLength": 10**rng.randrange(2, 9), "pattern": "^(ab|a)*$"},
            {"type": "array", "prefixItems": [text] * many},
            nested,
        ]
    )  # fmt: skip


def _chained(length: int, wrap: Callable[[dict[str, Any]], dict[str, Any]], last: dict[str, Any]) -> dict[str, Any]:
    definitions = {f"d{i}": wrap({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{length}": last}}


def _regex(rng: random.Random, depth: int) -> str:
    parts = []
    for _ in range(rng.randrange(1, 5)):
        part = (
            f"({_regex(rng, depth + 1)})"
            if depth < 4 and rng.random() < 0.4
            else rng.choice(_ATOMS[:13] if rng.random() < 0.8 else _ATOMS)
        )
        parts.append(
            part + (rng.choice(_REPEATS[:7] if rng.random() < 0.8 else _REPEATS) if rng.random() < 0.5 else "")
        )
    return rng.choice(["", "|"]).join(parts)


def _large_regex(rng: random.Random) -> str:
    count = rng.choice([10, 100, 1000, 5000])
    return rng.choice(
        [
            "(" * count + "a" + ")" * count,
            "(" * count + "a" + "+)" * count,
            "|".join(f"{rng.getrandbits(40):x}" for _ in range(count)),
            "".join(f"(a{{0,{count}}})" for _ in range(30)),
            f"(.*a.{{{count}}})+",
            f"(a|b)*a(a|b){{{count}}}",
            f"(({'x?' * 30}){{{count}}}){{{count}}}",
            "[" + "".join(f"\\u{{{code:x}}}" for code in range(0x100, 0x100 + 3 * count, 3)) + f"]{{1,{count}}}",
            r"(\w{1,200}\W{1,200}){1,200}" + "." * count,
            "(?i)" + "straße" * count,
        ]
    )


def _lark(rng: random.Random) -> str:
    """Rules that refer to one another, and terminals with every operator."""
    names = [f"r{i}" for i in range(rng.randrange(1, 6))]
    atoms = [
        *names,
        "T",
        "U",
        '"x"',
        '""',
        "/a+/",
        "<|im_end|>",
        "<[5]>",
        "<[99999999]>",
        "%json {}",
        "@nope",
        "(",
        "~",
        "nowhere",
    ]

    def body() -> str:
        words = [
            rng.choice(atoms[:9] if rng.random() < 0.8 else atoms)
            + rng.choice(["", "", "*", "+", "?", "{2,5}", "{1000000}"])
            for _ in range(rng.randrange(5))
        ]
        return rng.choice([" ", " | "]).join(words)

    rules = [f"{name}{rng.choice(['', '', '[lazy]', '[max_tokens=3]', '[temperature=9]'])}: {body()}" for name in names]
    terminals = [
        f"{name}: /{_regex(rng, 2).replace('/', '')}/ {rng.choice(['', '& /.*b.*/', '& ~/c/', '| /d/'])}"
        for name in "TU"
    ]
    return "\n".join(
        [f"start: {body()}", *rules, *terminals, rng.choice(["", "%ignore / /", "%import x.y", "%llguidance {}"])]
    )


def _large_lark(rng: random.Random) -> str:
    count = rng.choice([20, 60, 1000, 9000])
    chain = "\n".join(f"r{i}: r{i + 1} {rng.choice(['', 'r0', '?'])}".rstrip("?") for i in range(count))
    return rng.choice(
        [
            f'start: r0\n{chain}\nr{count}: "a"',
            "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(count)) + f'\nr{count}: "a"',
            "start: r0\n" + "\n".join(f"r{i}: r{i + 1} | r{i + 1} r{i + 1}" for i in range(count)) + f'\nr{count}: "a" | ',
            "start: " + " ".join(f"a{i}?" for i in range(count)) + "\n" + "\n".join(f'a{i}: "{i}"' for i in range(count)),
            "start: T\nT: " + " & ".join(f"/(.*{chr(97 + i)}){{{i + 2}}}/" for i in range(rng.choice([3, 8, 20]))),
            "start: T\nT: ~(" + "~(" * min(count, 200) + "/a/" + ")" * min(count, 200) + ")",
            "start: " + "(" * count + '"a"' + ")*" * count,
            'start: a\na: a a | a a a | "x" | ',
            "start: %json " + '{"items":' * count + "{}" + "}" * count,
        ]
    )  # fmt: skip


def _choices(rng: random.Random) -> list[Any]:
    if rng.random() < 0.5:
        return [f"{rng.getrandbits(64):x}" for _ in range(rng.choice([10, 1000, 4000]))]
    words = ["a", "", "é🙂", '"', "\n", "\\", 5, "x" * rng.choice([1, 100, 5000])]
    return [rng.choice(words) for _ in range(rng.choice([0, 1, 3, 50, 5000]))]


def _junk(rng: random.Random) -> Any:
    value: Any = rng.choice(
        [{}, [], "x", 5, True, {"type": 5}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": []}]
    )
    return rng.choice(
        [
            value,
            {"json": value},
            {"regex": value},
            {"choice": value},
            {"grammar": value},
            {"json_object": value},
            {"json": {}, "regex": "a"},
        ]
    )
