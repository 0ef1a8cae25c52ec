from __future__ import annotations

from pathlib import Path

from baton.kvtransfer.diagram import BEGIN, END, diagrams

README = Path(__file__).parents[3] / "kvtransfer" / "README.md"


def test_the_readme_shows_the_tables_as_they_are() -> None:
    text = README.read_text()
    shown = text[text.index(BEGIN) : text.index(END) + len(END) + 1]
    assert shown == diagrams(), "run: python -m baton.kvtransfer.diagram, and put the result into kvtransfer/README.md"
