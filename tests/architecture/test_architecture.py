"""The rules of the house that a reader cannot see from one file: layers, packages, sizes, and what must not be there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_ROOTS = ("services", "kernels", "kvtransfer", "load")
MAX_FILE_LINES = 400
# Modules whose loaders run what they read, and names that do so inside other modules.
EXECUTABLE_FORMATS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
EXECUTING_CALLS = {"eval", "exec", "compile", "__import__"}
EXECUTING_METHODS = {"torch.load", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load", "socket.recv_pyobj"}


def files(suffix: str) -> list[Path]:
    """Files of the project; not what git ignores: caches, builds, environments."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__pycache__", "build", "dist", "bench-results"))
            and not name.endswith(".egg-info")
            and not Path(folder, name, "pyvenv.cfg").exists()
        ]
        found += [Path(folder, name) for name in names if name.endswith(suffix)]
    return sorted(found)


def is_generated(path: Path) -> bool:
    return path.is_relative_to(ROOT / "proto" / "gen")


SOURCES = [path for path in files(".py") if not is_generated(path)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 50
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {*PACKAGE_ROOTS, "tests"}


def test_layers_and_the_pure_core_hold() -> None:
    run = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_packages_in_pyproject_are_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for root in PACKAGE_ROOTS for path in (ROOT / root).rglob("__init__.py")}
    expected = {"baton." + str(folder.relative_to(ROOT)).replace(os.sep, ".") for folder in folders}
    generated = {path.parent for path in (ROOT / "proto/gen/baton/api").rglob("__init__.py")}
    expected |= {
        "baton." + str(folder.relative_to(ROOT / "proto/gen/baton")).replace(os.sep, ".") for folder in generated
    }
    assert sorted(listed) == sorted(expected)


def test_every_folder_with_modules_is_a_package() -> None:
    modules = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGE_ROOTS]
    assert [name_of(path) for path in modules if not path.with_name("__init__.py").exists()] == []


def test_no_file_is_too_long() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_nothing_that_executes_what_it_reads() -> None:
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [
            (name_of(path), line, name) for line, name in imports(tree) if name.split(".")[0] in EXECUTABLE_FORMATS
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                if name in EXECUTING_CALLS or any(name == m or name.endswith(f".{m}") for m in EXECUTING_METHODS):
                    found.append((name_of(path), node.lineno, name))
                found += [
                    (name_of(path), node.lineno, f"{name}({keyword.arg}=...)")
                    for keyword in node.keywords
                    if keyword.arg in ("trust_remote_code", "allow_pickle")
                    and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "is_bad"),
    [
        ("import pickle", True),
        ("from torch import load\nimport torch\ntorch.load('x')", True),
        ("eval('1')", True),
        ("model.eval()", False),
        ("re.compile('x')", False),
    ],
)
def test_the_scan_finds_what_it_looks_for(
    code: str, is_bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.py"
    file.write_text(code)
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", [file])
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    if is_bad:
        with pytest.raises(AssertionError):
            test_nothing_that_executes_what_it_reads()
    else:
        test_nothing_that_executes_what_it_reads()


def test_our_own_code_is_imported_by_its_full_name() -> None:
    found = [
        (name_of(path), line, name)
        for path in SOURCES
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in PACKAGE_ROOTS
    ]
    assert found == []


def test_generated_code_is_current(tmp_path: Path) -> None:
    out = tmp_path / "gen"
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([ROOT / "proto" / "generate.sh", out], env=environment, check=True, capture_output=True)

    def content(folder: Path) -> dict[str, str]:
        files = [path for path in folder.rglob("*.py*") if path.suffix in (".py", ".pyi")]
        return {str(path.relative_to(folder)): path.read_text() for path in files}

    assert content(ROOT / "proto" / "gen") == content(out), "run `make proto`"


def test_links_in_documents_lead_somewhere() -> None:
    broken = []
    for path in files(".md"):
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue  # another site
            file, _, anchor = target.partition("#")
            linked = (path.parent / file).resolve() if file else path
            if not linked.exists() or (anchor and anchor not in anchors(linked)):
                broken.append((name_of(path), target))
    assert broken == []


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown file's headings get on the usual sites."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("folder", ["proto", "kernels", "kvtransfer", "services", "charts", "load", "tests", "docs"])
def test_every_top_level_folder_explains_itself(folder: str) -> None:
    readme = ROOT / folder / "README.md"
    assert readme.exists()
    assert readme.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_is_named_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(
        re.findall(r"(?:^|`)make ([a-z][a-z-]*)", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    assert named
    assert named <= targets
