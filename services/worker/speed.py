"""How long a worker's steps take: first as the warm-up measured it, then as they went lately."""

from __future__ import annotations

import time
from collections.abc import Callable

from baton.services.core.scheduler.pace import prompts_s
from baton.services.engine.engine import Engine

# A prompt that took so long to warm up with tells the cost of a token well enough, unless it is as short as the first one.
_LONG_ENOUGH_S = 0.05
_TOO_LONG_S = 2.0
# Prompts come in bursts: their share is of some hundred steps.
_SHARE_BLEND = 0.01
_FIRST_PROMPT, _SECOND_PROMPT = 2, 32


class Speed:
    """Exponentially weighted, so that a change shows within about 20 steps."""

    def __init__(self, *, warm_step_s: float = 0.0, warm_s_per_token: float = 0.0, compiles: bool = False) -> None:
        """What the warm-up measured, 0.0 for unknown: a step of a few tokens, and what one more token adds to a prompt.

        ``compiles``: the first step of a size may take long, because kernels are compiled for it.
        """
        self.warm_step_s = warm_step_s
        self.warm_s_per_token = warm_s_per_token
        self.prefill_s_per_token = 0.0
        self.decode_step_s = 0.0
        self._stream_steps_s = 0.0  # steps in which streams get their tokens, and what prompts took of them: means
        self._prompts_s = 0.0
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self._compiles = compiles
        self._known_sizes: set[tuple[int, int]] = set()

    def observe(self, step_s: float, num_prompt_tokens: int, num_sampled: int, num_generating: int) -> None:
        """One step computed so many prompt tokens, for so many requests one token more, and drew so many new ones."""
        self.generation_tokens_total += num_sampled
        self.prompt_tokens_total += num_prompt_tokens
        self.know(num_prompt_tokens, num_generating)
        others_s = self.decode_step_s if num_generating else min(self.decode_step_s, self.warm_step_s)
        if num_generating and step_s > 0.0:
            part_s = prompts_s(step_s, others_s) if num_prompt_tokens else 0.0
            self._stream_steps_s += _SHARE_BLEND * (step_s - self._stream_steps_s)
            self._prompts_s += _SHARE_BLEND * (part_s - self._prompts_s)
        if num_prompt_tokens > 4 * num_sampled:
            # A step has its floor: where prompts come in small chunks it is much of what they take.
            took_s = prompts_s(step_s, others_s) / num_prompt_tokens
            self.prefill_s_per_token = _blend(self.prefill_s_per_token, took_s)
        elif num_sampled and not num_prompt_tokens:
            self.decode_step_s = _blend(self.decode_step_s, step_s)

    @property
    def prompt_share(self) -> float:
        """Of the time of steps in which streams get their tokens, what prompts took that were computed in them, lately."""
        return self._prompts_s / self._stream_steps_s if self._stream_steps_s > 0.0 else 0.0

    def know(self, num_prompt_tokens: int, num_generating: int) -> None:
        """A step of such a size was computed: nothing is left to compile for the next."""
        self._known_sizes.add(_size(num_prompt_tokens, num_generating))

    def expected_step_s(self, num_prompt_tokens: int, num_generating: int) -> float | None:
        """How long a step should take, at most; None where there is nothing to tell it from, or where something may have to be
        compiled for it."""
        if self._compiles and _size(num_prompt_tokens, num_generating) not in self._known_sizes:
            return None
        per_token_s = self.prefill_s_per_token or self.warm_s_per_token
        decode_step_s = self.decode_step_s or self.warm_step_s
        if (num_prompt_tokens and not per_token_s) or (num_generating and not decode_step_s):
            return None
        # The batch may be many times the one that was measured; then a token costs no more than one of a prompt.
        decode_s = decode_step_s + num_generating * per_token_s if num_generating else 0.0
        return max(self.warm_step_s, num_prompt_tokens * per_token_s) + decode_s if num_prompt_tokens else decode_s


def warm_up(engine: Engine, max_num_tokens: int, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Computes prompts that grow, and a token after each, so that nothing in service is the first of its kind.

    On a CPU until the size tells the speed; where kernels are compiled, up to a full step, so that they are.
    """

    def timed(num_tokens: int) -> float:
        started_s = clock()
        engine.warm_up(num_tokens)
        return clock() - started_s

    engine.warm_up(_FIRST_PROMPT)  # libraries load, kernels compile
    compiles = engine.device.type != "cpu"
    num_tokens, first_s = _FIRST_PROMPT, timed(_FIRST_PROMPT)
    took_s = first_s
    speed = Speed(warm_step_s=first_s, warm_s_per_token=took_s / num_tokens, compiles=compiles)
    speed.know(num_tokens, 0)
    speed.know(0, 1)
    while compiles or took_s < (_TOO_LONG_S if num_tokens == _FIRST_PROMPT else _LONG_ENOUGH_S):
        num_tokens = 2 * num_tokens if compiles or num_tokens > _FIRST_PROMPT else _SECOND_PROMPT
        if num_tokens > max_num_tokens:
            break
        if compiles:
            engine.warm_up(num_tokens)
        took_s = timed(num_tokens)
        speed.warm_s_per_token = took_s / num_tokens
        speed.know(num_tokens, 0)
    return speed


def _size(num_prompt_tokens: int, num_generating: int) -> tuple[int, int]:
    return num_prompt_tokens.bit_length(), num_generating.bit_length()


def _blend(before: float, now: float) -> float:
    return now if before == 0.0 else 0.9 * before + 0.1 * now
