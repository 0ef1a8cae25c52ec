"""How long this worker's steps take, as the scheduler itself sees it: what it predicts, and sizes chunks by."""

from __future__ import annotations

from collections.abc import Sequence

from baton.services.core.scheduler.base import ScheduledRequest, SchedulerLimits

# A step below this many prompt tokens says more about a step than about a token.
_MIN_PROMPT_TOKENS = 4
_BLEND = 0.1


class Pace:
    """Exponentially weighted over the last steps. 0.0: nothing is known yet."""

    def __init__(self, prefill_s_per_token: float = 0.0, decode_step_s: float = 0.0) -> None:
        """What a warm-up measured."""
        self.prefill_s_per_token = prefill_s_per_token
        self.decode_step_s = decode_step_s

    def observe(self, step_s: float, num_prompt_tokens: int, num_decodes: int) -> None:
        """A step took so long, and computed so many tokens of prompts and one for each of so many requests."""
        if step_s <= 0.0:
            return
        if not num_prompt_tokens:
            if num_decodes:
                self.decode_step_s = _blended(self.decode_step_s, step_s)
        elif num_prompt_tokens >= _MIN_PROMPT_TOKENS:
            prompts_s = max(0.0, step_s - (self.decode_step_s if num_decodes else 0.0))
            self.prefill_s_per_token = _blended(self.prefill_s_per_token, prompts_s / num_prompt_tokens)

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds that computing so many tokens of a prompt should take."""
        return num_tokens * self.prefill_s_per_token

    def tokens_beside(self, tpot_s: float, least: int) -> int | None:
        """Prompt tokens that a step may compute so that those who generate in it have their next token within ``tpot_s``.

        At least ``least``, or a prompt would wait for ever where the target cannot be kept anyway. None: as many as there are.
        """
        if self.prefill_s_per_token <= 0.0:
            return None
        return max(least, int((tpot_s - self.decode_step_s) / self.prefill_s_per_token))


def prompt_budget(limits: SchedulerLimits, pace: Pace, decodes: Sequence[ScheduledRequest], least: int) -> int:
    """Tokens of prompts in a step: the streams in it are to have their next tokens in time. At least ``least``."""
    budget = limits.max_num_batched_tokens - len(decodes)
    if decodes and limits.max_interleaved_prefill_tokens is not None:
        budget = min(budget, limits.max_interleaved_prefill_tokens)
    targets = [tpot_s for item in decodes if (tpot_s := item.request.service.tpot_s) is not None]
    if targets and (most := pace.tokens_beside(min(targets), least)) is not None:
        budget = min(budget, most)
    return budget


def _blended(before: float, now: float) -> float:
    return now if before == 0.0 else (1.0 - _BLEND) * before + _BLEND * now
