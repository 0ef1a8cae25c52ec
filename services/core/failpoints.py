"""Failpoints: named places in production code where a test may make a process fail. This half parses and decides.

    rules   := rule (";" rule)*          or "on": allowed, none set yet
    rule    := [worker "@"] point "=" action (":" condition)*
    action  := crash | raise | hang | delay(MS)
    condition := once | times(N) | after(N) | token(ID)

``prefill-0@kv.send.frame_k=crash:after(3)`` ends worker prefill-0 when it is about to send its fourth frame of blocks.
``after`` skips that many hits, ``times`` fires at most so often (``once``: one time), and ``token`` counts only hits where
a request with that token is at work. What the actions do is the business of ``runtime.failpoints``.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

POINTS = {
    "prefill.before_claim": "a prefill worker was told of a request and has not taken it in yet",
    "prefill.between_chunks": "a chunk of a prompt is computed, and more of it is to come",
    "prefill.mid_layer": "half of the model's layers are computed for a step with a prompt in it",
    "kv.send.frame_k": "a frame of blocks is about to be sent; say which with after(K)",
    "kv.commit.before": "all blocks are sent, and the receiver is about to be asked to take over",
    "decode.before_claim": "a decode worker was told of a request and has not taken it in yet",
    "decode.before_first": "all blocks have arrived, and a decode worker is about to take them over",
    "decode.step_n": "a step that generates is about to begin; say which with after(N)",
    "alloc.oom": "the pool is asked how many blocks it can give: with raise, it says none",
    "bus.publish": "something is about to be published: with raise, it is dropped",
    "lease.renew": "a sender is about to renew its leases: with raise, it does not",
    "engine.step_hang": "a step is about to be computed",
    "engine.step_crash": "the same; for requests that kill workers, with token(ID)",
    "engine.oom": "the same; raise raises the engine's own out-of-memory error",
    "loop.turn": "the event loop looks after its worker, about once a second",
}
ALLOWED = "on"

_RULE = re.compile(
    r"(?:(?P<worker>[a-z0-9-]+)@)?(?P<point>[\w.]+)=(?P<action>\w+)(?:\((?P<number>\d+)\))?(?P<rest>(?::.*)?)"
)
_CONDITION = re.compile(r"(?P<name>\w+)(?:\((?P<number>\d+)\))?")


class Action(StrEnum):
    """What happens at a point."""

    CRASH = "crash"  # the process ends at once, without a word to anybody
    RAISE = "raise"  # the operation fails
    HANG = "hang"  # the thread, or the task, stays where it is until the failpoints are set anew
    DELAY = "delay"  # it goes on after some milliseconds


@dataclass(frozen=True, slots=True)
class Rule:
    """When which point does what."""

    point: str
    action: Action
    delay_s: float = 0.0
    worker_id: str | None = None  # None: every process
    after: int = 0  # hits that nothing happens at
    times: int | None = None  # most often that it happens; None: always
    token_id: int | None = None


def parse_failpoints(text: str) -> tuple[Rule, ...]:
    """Rules from their text. Raises ValueError that names the rule and what is wrong with it."""
    if text.strip() == ALLOWED:
        return ()
    return tuple(_parse_rule(part) for part in map(str.strip, text.split(";")) if part)


class Failpoints:
    """The rules of one process and how often each point was reached. Not thread-safe: ``runtime.failpoints`` locks."""

    def __init__(self, rules: Iterable[Rule], worker_id: str = "") -> None:
        """Rules that name another worker are left out."""
        self.rules = tuple(rule for rule in rules if rule.worker_id in (None, worker_id))
        self.num_reached: Counter[str] = Counter()
        self._num_hits = [0] * len(self.rules)

    @property
    def points(self) -> frozenset[str]:
        """Points that have a rule."""
        return frozenset(rule.point for rule in self.rules)

    def reach(self, point: str, token_ids: Callable[[], Iterable[int]] = tuple) -> Rule | None:
        """A point was reached by work on requests with these tokens. Returns the first rule that fires now, if one does."""
        self.num_reached[point] += 1
        fires: Rule | None = None
        for index, rule in enumerate(self.rules):
            if rule.point != point or (rule.token_id is not None and rule.token_id not in token_ids()):
                continue
            self._num_hits[index] += 1
            num_fired = self._num_hits[index] - rule.after
            if fires is None and num_fired > 0 and (rule.times is None or num_fired <= rule.times):
                fires = rule
        return fires


def _parse_rule(text: str) -> Rule:
    match = _RULE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not point=action[:condition...], for example kv.send.frame_k=crash:after(3)")
    point = match["point"]
    if point not in POINTS:
        known = difflib.get_close_matches(point, POINTS, n=1)
        hint = f" (did you mean {known[0]}?)" if known else f"; there are {', '.join(POINTS)}"
        raise ValueError(f"{text!r}: no such failpoint{hint}")
    try:
        action = Action(match["action"])
    except ValueError:
        raise ValueError(f"{text!r}: the action must be one of crash, raise, hang, delay(MS)") from None
    if (match["number"] is not None) != (action is Action.DELAY):
        raise ValueError(f"{text!r}: delay needs milliseconds, as in delay(200), and no other action takes a number")
    after, times, token_id = _parse_conditions(text, match["rest"])
    delay_s = int(match["number"] or 0) / 1e3
    return Rule(point, action, delay_s, match["worker"], after, times, token_id)


def _parse_conditions(text: str, conditions: str) -> tuple[int, int | None, int | None]:
    """``:after(1):once`` as (after, times, token)."""
    values: dict[str, int] = {}
    for condition in conditions.split(":")[1:]:
        match = _CONDITION.fullmatch(condition)
        name, number = (match["name"], match["number"]) if match else ("", None)
        if name == "once" and number is None:
            name, number = "times", "1"
        if name not in ("after", "times", "token") or number is None:
            raise ValueError(f"{text!r}: {condition!r} is none of once, times(N), after(N), token(ID)")
        if name in values:
            raise ValueError(f"{text!r}: says {name} twice")
        values[name] = int(number)
    return values.get("after", 0), values.get("times"), values.get("token")
