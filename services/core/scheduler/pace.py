"""How long this worker's steps take, as the scheduler itself sees it: what it predicts, and sizes chunks by."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from baton.services.core.affine import AffineFit
from baton.services.core.scheduler.base import ScheduledRequest, SchedulerLimits

# A step below this many prompt tokens says more about a step than about a token.
_MIN_PROMPT_TOKENS = 4
_BLEND = 0.1
_STEPS_REMEMBERED = 100.0
# Of a step with prompts, what they take at least, whatever is known of the rest.
_LEAST_SHARE = 0.1
# Of a target, the part that steps are planned to take: a target is a mean, and steps that all take it miss it as often as not.
# Less than the gateway plans with (``admission.AdmissionLimits.margin``), or prompts beside streams would close its door.
STEP_SHARE = 0.65
# Handoffs that tell what the next ones will be like: so many of the last, and none that is older.
_HANDOFFS_SEEN, HANDOFF_MEMORY_S = 16, 10.0


class Pace:
    """Exponentially weighted over the last steps. 0.0: nothing is known yet."""

    def __init__(self, prefill_s_per_token: float = 0.0, decode_step_s: float = 0.0) -> None:
        """What a warm-up measured."""
        self.prefill_s_per_token = prefill_s_per_token
        self.decode_step_s = decode_step_s
        self._steps = AffineFit(memory=_STEPS_REMEMBERED)  # without prompts, by the number of streams

    def observe(self, step_s: float, num_prompt_tokens: int, num_decodes: int) -> None:
        """A step took so long, and computed so many tokens of prompts and one for each of so many requests."""
        if step_s <= 0.0:
            return
        if not num_prompt_tokens:
            if num_decodes:
                self.decode_step_s = _blended(self.decode_step_s, step_s)
                self._steps.observe(num_decodes, step_s)
        elif num_prompt_tokens >= _MIN_PROMPT_TOKENS:
            # A step has its floor also where nobody generates: in small chunks it is much of what they take.
            others_s = self.step_s(num_decodes) if num_decodes else self._steps.at(0)
            took_s = prompts_s(step_s, others_s) / num_prompt_tokens
            self.prefill_s_per_token = _blended(self.prefill_s_per_token, took_s)

    def step_s(self, num_decodes: int) -> float:
        """Seconds of a step in which so many generate and no prompt is computed."""
        return self._steps.at(num_decodes) if self._steps.is_known else self.decode_step_s

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds that computing so many tokens of a prompt should take."""
        return num_tokens * self.prefill_s_per_token

    def tokens_beside(self, num_decodes: int, tpot_s: float, least: int) -> int | None:
        """Prompt tokens that a step may compute so that the ``num_decodes`` who generate in it keep to ``tpot_s`` a token.

        At least ``least``, or a prompt would wait for ever where the target cannot be kept anyway. None: as many as there are.
        """
        if self.prefill_s_per_token <= 0.0:
            return None
        return max(least, int((STEP_SHARE * tpot_s - self.step_s(num_decodes)) / self.prefill_s_per_token))


class Handoffs:
    """Streams that other workers hand over: the next may begin at any moment, and not wait for the end of a long step.

    One that has arrived has waited for such an end already, so the step that it is in first may only take what is left of its
    target. Where that is no room for a prompt the prompts miss a turn, but never two in a row.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=_HANDOFFS_SEEN)  # when, target
        self._begun: list[tuple[float, float]] = []  # since the last step
        self._have_passed = False  # the prompts missed the last turn

    def on_announced(self, tpot_s: float | None, now: float) -> None:
        """Its blocks will come."""
        if tpot_s is not None:
            self._seen.append((now, tpot_s))

    def on_begun(self, tpot_s: float | None, now: float) -> None:
        """It has its first token, and waits for the next."""
        if tpot_s is not None:
            self._begun.append((now, tpot_s))

    def budget(self, pace: Pace, num_decodes: int, least: int, now: float) -> int | None:
        """Tokens of prompts in the step that begins now. None: as many as there are."""
        while self._seen and self._seen[0][0] < now - HANDOFF_MEMORY_S:
            self._seen.popleft()
        strictest_s = min((tpot_s for _, tpot_s in self._seen), default=None)
        budget = None if strictest_s is None else pace.tokens_beside(num_decodes, strictest_s, least)
        left_s = min((tpot_s - (now - begun_s) / STEP_SHARE for begun_s, tpot_s in self._begun), default=None)
        self._begun.clear()
        if left_s is None or budget is None:
            self._have_passed = False
            return budget
        first = pace.tokens_beside(num_decodes, left_s, 0)
        if first is None or first >= least:
            self._have_passed = False
            return first
        self._have_passed = not self._have_passed
        return 0 if self._have_passed else budget


def prompts_s(step_s: float, others_s: float) -> float:
    """What the prompts took of a step whose rest takes ``others_s``."""
    return max(_LEAST_SHARE * step_s, step_s - others_s)


def prompt_budget(
    limits: SchedulerLimits,
    pace: Pace,
    decodes: Sequence[ScheduledRequest],
    least: int,
    handoffs: Handoffs | None,
    now: float,
) -> int:
    """Tokens of prompts in the step that begins now: the streams in it are to have their next tokens in time. At least
    ``least``, but in the first step of a stream that was handed over. ``handoffs``: None where none come."""
    budget = limits.max_num_batched_tokens - len(decodes)
    if decodes and limits.max_interleaved_prefill_tokens is not None:
        budget = min(budget, limits.max_interleaved_prefill_tokens)
    if handoffs is not None and (handed_over := handoffs.budget(pace, len(decodes), least, now)) is not None:
        budget = min(budget, handed_over)
    targets = [tpot_s for item in decodes if (tpot_s := item.request.service.tpot_s) is not None]
    if targets and (most := pace.tokens_beside(len(decodes), min(targets), least)) is not None:
        budget = min(budget, most)
    return budget


def _blended(before: float, now: float) -> float:
    return now if before == 0.0 else (1.0 - _BLEND) * before + _BLEND * now
