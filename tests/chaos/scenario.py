"""Scenarios: what is started, what is asked, what goes wrong when, and what has to come out. Read from YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from chaos.cluster import Options
from chaos.load import Shape

FOLDER = Path(__file__).parent / "scenarios"

ACTIONS = ("signal", "start", "fault", "clear", "failpoint", "add_worker", "wait_ready", "probe", "pause")
TRIGGERS = ("sent", "tokens", "ended", "streaming", "seconds", "pieces", "state", "queued", "running", "load_ended")


@dataclass(frozen=True)
class Step:
    """One thing that is done when its trigger is there, after the steps before it."""

    when: Mapping[str, Any]
    action: str
    arguments: Any

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Step:
        when = dict(values.get("when", {}))
        actions = [name for name in values if name != "when"]
        if len(actions) != 1 or actions[0] not in ACTIONS:
            raise ValueError(f"a step has exactly one of {', '.join(ACTIONS)}, got {', '.join(actions) or 'none'}")
        if unknown := set(when) - set(TRIGGERS):
            raise ValueError(f"unknown trigger {', '.join(unknown)}")
        return cls(when, actions[0], values[actions[0]])


@dataclass(frozen=True)
class Criteria:
    """What has to come out. Counts are limits, 0 unless said otherwise."""

    failed: int = 0
    wrong: int = 0
    lost: int = 0
    doubled: int = 0
    leaked: int = 0
    recovery_s: float | None = None  # of any stream, from detection to its next token
    detection_s: float | None = None
    clean_s: float = 25.0  # a lease and ten seconds: by then nothing is held
    errors: Sequence[str] = ()  # codes that failures may have; empty: any
    min_failed: int = 0
    min_retries: int = 0  # or the fault met nobody, and nothing was tried
    min_injected: int = 0  # likewise: faults of links, and failpoints that were reached
    min_injected_each: int = 0  # the same in every single run
    min_fenced: int = 0  # stale messages that were refused
    max_growth: float | None = None  # private memory of any process of ours, as a factor
    growth_from: int = 0  # since so many requests had ended
    all_flips_detected: bool = False  # as many blocks refused for their checksum as bits flipped, each in another frame
    max_crashes: int | None = None  # of workers, by themselves


@dataclass(frozen=True)
class Scenario:
    """See the files in ``scenarios/``."""

    name: str
    failures: tuple[str, ...]
    says: str
    options: Options = field(default_factory=Options)
    load: Shape = field(default_factory=Shape)
    steps: tuple[Step, ...] = ()
    expect: Criteria = field(default_factory=Criteria)
    restarts: bool = False  # a supervisor starts again what ends
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # one name, whose values stand for $name
    repeat: int = 1
    heals: bool = True  # afterwards everything runs again; without it, what has ended stays ended

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Scenario:
        known = {f.name for f in fields(cls)} - {"options"} | {"cluster"}
        if unknown := set(values) - known:
            raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
        simple = {
            name: values[name] for name in ("name", "says", "restarts", "sweep", "repeat", "heals") if name in values
        }
        return cls(
            failures=tuple(values["failures"]),
            options=Options(**values.get("cluster", {})),
            load=Shape.parse(values.get("load", {})),
            steps=tuple(Step.parse(step) for step in values.get("steps", [])),
            expect=Criteria(**values.get("expect", {})),
            **simple,
        )

    def variants(self) -> list[tuple[Step, ...]]:
        """The steps of each run: once per value of the sweep, all of it ``repeat`` times."""
        variants = [self.steps]
        for name, choices in self.sweep.items():
            variants = [tuple(_fill(step, name, value) for step in self.steps) for value in choices]
        return variants * self.repeat


def load_scenarios(folder: Path = FOLDER) -> list[Scenario]:
    """All of them, those for the same installation beside each other. Raises ValueError naming the file."""
    scenarios = []
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            try:
                scenarios.append(Scenario.parse(document))
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(f"{path.name}: {error}") from error
    order: dict[str, int] = {}
    for scenario in scenarios:
        order.setdefault(scenario.options.key, len(order))
    return sorted(scenarios, key=lambda scenario: order[scenario.options.key])


def _fill(step: Step, name: str, value: Any) -> Step:
    return Step(_filled(step.when, name, value), step.action, _filled(step.arguments, name, value))


def _filled(tree: Any, name: str, value: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _filled(child, name, value) for key, child in tree.items()}
    if isinstance(tree, list):
        return [_filled(child, name, value) for child in tree]
    if tree == f"${name}":
        return value
    return tree.replace(f"${name}", str(value)) if isinstance(tree, str) else tree
