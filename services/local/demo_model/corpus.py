"""Plain English that every Python installation has: the language reference in `pydoc_data`, and docstrings.

Both are part of Python and under the PSF licence. Prose paragraphs only: code, tables and signatures are left out.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

_DOCSTRING_MODULES = (
    "argparse", "ast", "asyncio.events", "asyncio.streams", "bdb", "calendar", "cmd", "codecs", "collections", "configparser",
    "contextlib", "csv", "datetime", "decimal", "difflib", "doctest", "email.message", "enum", "fractions", "ftplib",
    "functools", "glob", "gzip", "heapq", "http.client", "http.cookies", "imaplib", "inspect", "ipaddress", "logging",
    "mailbox", "mimetypes", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "random", "re", "sched",
    "shutil", "smtplib", "socket", "socketserver", "statistics", "string", "subprocess", "tarfile", "tempfile",
    "textwrap", "threading", "timeit", "traceback", "turtle", "typing", "unittest.case", "unittest.mock", "uuid",
    "warnings", "weakref", "zipfile",
)  # fmt: skip
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[a-z)\"'][.!?]) +(?=[A-Z])")
_MARKUP = re.compile(r'[*`"]+')


@cache
def paragraphs() -> tuple[str, ...]:
    """The prose paragraphs, one line each, in a fixed order, without duplicates."""
    found: dict[str, None] = {}
    for text in [*(topics[name] for name in sorted(topics)), *_docstrings()]:
        for raw in _PARAGRAPH_END.split(text):
            line = _MARKUP.sub("", " ".join(raw.split()))
            if _is_prose(line):
                found[line] = None
    return tuple(found)


@cache
def sentences() -> tuple[str, ...]:
    """The sentences of `paragraphs()` that are of middle length: what fills a prompt between its facts."""
    parts = (part for line in paragraphs() for part in _SENTENCE_END.split(line))
    return tuple(dict.fromkeys(part for part in parts if 30 <= len(part) <= 180 and part.endswith(".")))


def _is_prose(line: str) -> bool:
    if len(line) < 60 or not line[0].isupper() or line[-1] not in ".:!?":
        return False
    plain = sum(char.isalpha() or char in " ,.'" for char in line)
    return plain / len(line) > 0.93 and ">>>" not in line and "::" not in line


def _docstrings() -> list[str]:
    """Docstrings read from the source files, so that nothing is imported for them."""
    texts = []
    for name in _DOCSTRING_MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return texts
