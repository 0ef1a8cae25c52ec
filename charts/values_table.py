"""Writes the table of values into the chart's README, from the comments in values.yaml.

Every key that is set has a comment `# -- ...` above it, which may go on in further comment lines. `--check` changes
nothing and fails if the README is not what it would be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "baton"
_BEGIN = "<!-- values: written by charts/values_table.py -->"
_END = "<!-- end of values -->"


@dataclass(frozen=True)
class Value:
    """A key of values.yaml: dotted path, default as JSON, and its comment."""

    path: str
    default: str
    comment: str


def read_values(text: str) -> list[Value]:
    """All keys of ``text`` in order. Raises ValueError that names every key without a comment."""
    lines = text.splitlines()
    values = [
        Value(path, json.dumps(default), _comment_above(lines, line))
        for path, default, line in _leaves(yaml.compose(text, Loader=yaml.SafeLoader), "")
    ]
    bare = [value.path for value in values if not value.comment]
    if bare:
        raise ValueError(f"values.yaml: no '# --' comment above {', '.join(bare)}")
    return values


def render_table(values: list[Value]) -> str:
    """A Markdown table."""
    rows = [f"| `{value.path}` | `{value.default}` | {value.comment.replace('|', chr(92) + '|')} |" for value in values]
    return "\n".join(["| key | default | what |", "|---|---|---|", *rows])


def render_readme(readme: str, values: str) -> str:
    """``readme`` with its table of values replaced."""
    before, _, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise ValueError(f"README.md: expected the lines {_BEGIN!r} and {_END!r}")
    return f"{before}{_BEGIN}\n{render_table(read_values(values))}\n{_END}{after}"


def _leaves(node: yaml.Node | None, path: str) -> Iterator[tuple[str, Any, int]]:
    """(path, value, line of the key) of every key that holds no section. A mapping in one line, {..}, is a value."""
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        child = f"{path}.{key.value}" if path else key.value
        line = key.start_mark.line
        section = isinstance(value, yaml.MappingNode) and not value.flow_style
        if section and not _is_value(value):
            yield from _leaves(value, child)
        else:
            yield child, yaml.safe_load(yaml.serialize(value)), line


def _is_value(node: yaml.MappingNode) -> bool:
    """Requests and limits are one value: Kubernetes', not ours."""
    return {key.value for key, _ in node.value} <= {"requests", "limits", "claims"}


def _comment_above(lines: list[str], line: int) -> str:
    """The comment that ends just above ``line`` and starts with '# --'; empty if there is none."""
    comment: list[str] = []
    for text in reversed(lines[:line]):
        stripped = text.strip()
        if not stripped.startswith("#"):
            return ""
        comment.append(stripped.removeprefix("#").strip())
        if stripped.startswith("# -- "):
            comment[-1] = stripped.removeprefix("# -- ")
            return " ".join(reversed(comment))
    return ""


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    path = CHART / "README.md"
    readme = path.read_text(encoding="utf-8")
    wanted = render_readme(readme, (CHART / "values.yaml").read_text(encoding="utf-8"))
    if readme == wanted:
        return 0
    if "--check" in arguments:
        print(f"{path}: the table of values is not current; run python {Path(__file__).name}", file=sys.stderr)
        return 1
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
