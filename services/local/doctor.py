"""``baton doctor``: looks at everything that Baton needs here, changes nothing, and says how to mend what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.text import Text


class Level(StrEnum):
    """What a finding means."""

    OK = "ok"
    WARN = "warn"  # works, but not as it should, or could not be found out
    FAIL = "fail"  # does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, how to mend it."""

    what: str
    level: Level
    found: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class PemFiles:
    """A certificate, its key, and the CA of the other side."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @property
    def given(self) -> bool:
        return (self.certificate, self.key, self.ca) != (None, None, None)


@dataclass(frozen=True, slots=True)
class Questions:
    """What to look at. ``model`` None: the bundled one."""

    model: str | None
    url: str
    api_key: str | None
    host: str
    port: int
    grpc_port: int
    kv_cache_bytes: int
    between: PemFiles = PemFiles()  # processes
    public: PemFiles = PemFiles()  # towards clients


Check = Callable[[Questions], Iterator[Finding]]

_MARKS = {Level.OK: ("ok  ", "green"), Level.WARN: ("warn", "yellow"), Level.FAIL: ("FAIL", "bold red")}


def doctor(questions: Questions, *, as_json: bool) -> int:
    """Prints every finding; 1 where one failed."""
    from baton.services.local.doctor_certificates import check_certificates
    from baton.services.local.doctor_gateway import check_gateway
    from baton.services.local.doctor_machine import MACHINE_CHECKS
    from baton.services.local.doctor_model import check_model

    console = Console(highlight=False, soft_wrap=True)
    findings: list[Finding] = []
    for finding in examine(questions, [*MACHINE_CHECKS, check_model, check_certificates, check_gateway]):
        findings.append(finding)
        if not as_json:
            console.print(line(finding))
    failed = sum(finding.level is Level.FAIL for finding in findings)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        warned = sum(finding.level is Level.WARN for finding in findings)
        console.print(f"{len(findings)} looked at, {warned} to mind, {failed} failed")
    return 1 if failed else 0


def examine(questions: Questions, checks: Sequence[Check]) -> Iterator[Finding]:
    """The findings of all checks. One that breaks is a finding itself: what could not be found out is not well."""
    for check in checks:
        try:
            yield from check(questions)
        except Exception as error:
            what = check.__name__.removeprefix("check_").replace("_", " ")
            yield Finding(what, Level.WARN, f"could not be looked at: {type(error).__name__}: {error}")


def line(finding: Finding) -> Text:
    """For people."""
    mark, style = _MARKS[finding.level]
    text = Text.assemble((mark, style), f"  {finding.what}: {finding.found}")
    if finding.mend and finding.level is not Level.OK:
        text.append(f"\n      {finding.mend}", style="dim")
    return text
