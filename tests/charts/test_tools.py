"""The chart's own tools: the lint of `make check`, and the table of values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.charts.loading import load_script
from tests.charts.render import CHART

lint = load_script(CHART.parent / "lint.py")
values_table = load_script(CHART.parent / "values_table.py")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the chart, to be broken."""
    return Path(shutil.copytree(CHART, tmp_path / "baton"))


def test_every_example_is_linted() -> None:
    names = [name for name, _ in lint.value_sets(CHART)]
    assert names == ["values.yaml", *sorted(path.name for path in (CHART / "examples").glob("values-*.yaml"))]


def test_lint_merges_as_helm_does() -> None:
    defaults = {"a": {"b": 1, "c": 2}, "l": [1], "n": 1}
    assert lint.merge(defaults, {"a": {"b": 3}, "l": [2], "n": None}) == {"a": {"b": 3, "c": 2}, "l": [2]}
    assert defaults == {"a": {"b": 1, "c": 2}, "l": [1], "n": 1}


@pytest.mark.parametrize(
    ("file", "broken"),
    [
        ("templates/gateway-service.yaml", lambda text: text + "\n{{ if }}"),
        ("templates/gateway-service.yaml", lambda text: text + "\nports: [\n"),
        ("templates/gateway-service.yaml", lambda text: text.replace("$service.port", "$service.port.number")),
        ("Chart.yaml", lambda text: text.replace("version: 0.1.0", "version: first")),
    ],
)
def test_lint_finds_a_broken_chart(copy: Path, file: str, broken: Callable[[str], str]) -> None:
    values = dict(lint.value_sets(copy))["values.yaml"]
    assert lint.findings(copy, values) == []
    path = copy / file
    before = path.read_text(encoding="utf-8")
    path.write_text(broken(before), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != before
    assert any("helm lint: error" in finding for finding in lint.findings(copy, values))


def test_lint_names_a_wrong_value(copy: Path) -> None:
    values: dict[str, Any] = lint.merge(dict(lint.value_sets(copy))["values.yaml"], {"decode": {"replicas": 0}})
    assert "values: $.decode.replicas: 0 is less than the minimum of 1" in lint.findings(copy, values)


def test_lint_fails_on_findings(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lint, "CHART", copy)
    for example in (copy / "examples").iterdir():
        example.unlink()
    assert lint.main() == 0
    (copy / "examples" / "values-wrong.yaml").write_text("logLevel: loud\n", encoding="utf-8")
    assert lint.main() == 1
    assert "values-wrong.yaml: values: $.logLevel: 'loud' is not one of" in capsys.readouterr().err


def test_the_readme_has_the_current_values() -> None:
    assert values_table.main(["--check"]) == 0


def test_a_readme_that_is_not_current_is_noticed_and_written(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_table, "CHART", copy)
    values = copy / "values.yaml"
    values.write_text(f"{values.read_text(encoding='utf-8')}\n# -- A new one.\nextra: 1\n", encoding="utf-8")
    assert values_table.main(["--check"]) == 1
    assert values_table.main([]) == 0
    assert values_table.main(["--check"]) == 0
    assert "| `extra` | `1` | A new one. |" in (copy / "README.md").read_text(encoding="utf-8")


def test_comments_may_go_on_and_sections_need_none() -> None:
    text = "a:\n  # -- One | thing,\n  # and another.\n  b: {}\n# -- Two.\nresources:\n  limits: {cpu: 1}\n"
    values = values_table.read_values(text)
    assert [(each.path, each.default, each.comment) for each in values] == [
        ("a.b", "{}", "One | thing, and another."),
        ("resources", '{"limits": {"cpu": 1}}', "Two."),
    ]
    assert r"One \| thing" in values_table.render_table(values)


def test_every_key_needs_a_comment() -> None:
    with pytest.raises(ValueError, match=r"no '# --' comment above a\.b, c"):
        values_table.read_values("a:\n  # a plain comment\n  b: 1\nc: 2\n")
