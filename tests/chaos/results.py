"""What came out of a run, counted, and whether it is what it has to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from chaos.load import Exchange, Expected, Reference
from chaos.scenario import Criteria


@dataclass
class Result:
    """Counts of one run, or of several together."""

    requests: int = 0
    failed: int = 0
    wrong: int = 0
    lost: int = 0
    doubled: int = 0
    leaked: int = 0
    retries: int = 0
    injected: int = 0
    fenced: int = 0
    crashes: int = 0
    flipped: int = 0  # frames in which a bit was flipped
    corrupt: int = 0  # blocks that workers refused for their checksum
    detection_s: float | None = None
    recovery_s: float | None = None
    clean_s: float = 0.0
    growth: float | None = None
    errors: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)  # what was held, which tokens were wrong, which probe failed

    def add(self, other: Result) -> None:
        """Takes another run in: counts add up, times are the worst ones."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if each.name.endswith("_s") or each.name == "growth":
                known = [value for value in (mine, theirs) if value is not None]
                setattr(self, each.name, max(known, default=None))
            else:
                setattr(self, each.name, mine + theirs)

    def problems(self, expect: Criteria, *, is_all: bool = True) -> list[str]:
        """Every criterion that is not met, in words. Floors are for all runs of a scenario together."""
        limits = [(name, getattr(self, name), getattr(expect, name)) for name in _COUNTS]
        limits += [(name, getattr(self, name), getattr(expect, name)) for name in _TIMES]
        limits += [("growth", self.growth, expect.max_growth), ("crashes", self.crashes, expect.max_crashes)]
        problems = [
            f"{name} {_shown(value)}, at most {_shown(limit)}"
            for name, value, limit in limits
            if value is not None and limit is not None and value > limit
        ]
        floors = [(name, getattr(self, name), getattr(expect, f"min_{name}")) for name in _FLOORS]
        problems += [f"{name} {value}, at least {floor}" for name, value, floor in floors if is_all and value < floor]
        if expect.all_flips_detected and self.corrupt != self.flipped:
            problems.append(f"{self.corrupt} corrupt blocks detected, {self.flipped} were flipped")
        if is_all and expect.detection_s is not None and self.detection_s is None:
            problems.append("nothing was detected")
        if expect.errors and (others := set(self.errors) - set(expect.errors)):
            problems.append(f"errors {', '.join(sorted(others))}, expected {', '.join(expect.errors)}")
        return problems

    def too_few(self, expect: Criteria) -> list[str]:
        """The one floor that every single run has."""
        floor = expect.min_injected_each
        return [f"injected {self.injected}, at least {floor} in each run"] if self.injected < floor else []


_COUNTS = ("failed", "wrong", "lost", "doubled", "leaked")
_TIMES = ("detection_s", "recovery_s", "clean_s")
_FLOORS = ("failed", "retries", "injected", "fenced")


def judge(exchanges: Sequence[Exchange], reference: Reference) -> Result:
    """Compares every answer with the undisturbed one."""
    result = Result(requests=len(exchanges))
    for exchange in exchanges:
        answer, expected = exchange.answer, reference[exchange.ask]
        if exchange.is_lost:
            result.lost += 1
            result.notes.append(f"{exchange.request_id}: no end after {len(answer.token_ids)} tokens")
        elif not answer.hung_up and (answer.error or len(answer.finish_reasons) == 0):
            result.failed += 1
            result.errors[answer.error or "no finish reason"] += 1
            result.notes.append(f"{exchange.request_id}: {answer.error}: {answer.message}")
        if answer.num_done > 1 or len(answer.finish_reasons) > 1:
            result.doubled += 1
            result.notes.append(f"{exchange.request_id}: {answer.num_done} ends, reasons {answer.finish_reasons}")
        is_whole = not answer.hung_up and not answer.error and not exchange.is_lost
        if problem := _difference(answer.token_ids, answer.text, expected, is_whole=is_whole):
            result.wrong += 1
            result.notes.append(f"{exchange.request_id}: {problem}")
        elif is_whole and answer.finish_reasons[:1] != [expected.finish_reason]:
            result.wrong += 1
            result.notes.append(f"{exchange.request_id}: finish reason {answer.finish_reasons}, not {expected}")
    return result


def _difference(token_ids: list[int], text: str, expected: Expected, *, is_whole: bool) -> str:
    """Where an answer differs from the expected one; empty where it does not. What is not whole must be its beginning."""
    ids, whole_text = list(expected.token_ids), expected.text
    number = len(token_ids)
    if token_ids != (ids if is_whole else ids[:number]):
        at = next((i for i, (a, b) in enumerate(zip(token_ids, ids, strict=False)) if a != b), min(number, len(ids)))
        return f"{number} of {len(ids)} tokens, the first wrong one is number {at}"
    if is_whole and text != whole_text:
        return f"text {text!r} of the right tokens"
    if not whole_text.startswith(text.rstrip("\ufffd")):
        return f"text {text!r} is not the beginning of {whole_text!r}"
    return ""


def _shown(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
