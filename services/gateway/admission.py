"""The door as requests meet it: they are let in, wait in front of the tokenizer, or are refused with the time to come back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from baton.services.core.admission import AdmissionControl, AdmissionLimits, Visit
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.slo import SloClass
from baton.services.gateway.generation import SloTarget
from baton.services.gateway.options import Caller, ChatPrompt, GenerationOptions, Prompt, TokenPrompt

# Of the usual tokenizers and languages; what is seen replaces it.
_CHARS_PER_TOKEN = 4.0
_BLEND = 0.05
# What a request costs besides its prompt, in tokens. Many short ones would make a token look dear otherwise, and a long prompt
# among them like hours.
_REQUEST_TOKENS = 32


class Ticket:
    """One request's place inside. Held by the scope of ``Admission.visiting``."""

    def __init__(self, admission: Admission, visit: Visit) -> None:
        self.visit = visit
        self._admission = admission
        self._num_tokens = 0

    def on_tokens(self, num_tokens: int) -> None:
        """So many more tokens of its streams are there."""
        if num_tokens:
            self._num_tokens += num_tokens
            control, visit = self._admission.control, self.visit
            control.progress(visit, self._num_tokens / visit.num_streams, self._admission.clock())

    def end(self) -> None:
        """The request is over. Idempotent."""
        self._admission.leave(self.visit)


_TICKETS: ContextVar[list[Ticket] | None] = ContextVar("tickets", default=None)


class Admission:
    """Carries out what ``AdmissionControl`` decides."""

    def __init__(
        self,
        clock: Callable[[], float],
        others_tokens: Callable[[], int] = lambda: 0,
        limits: AdmissionLimits | None = None,
        *,
        patience_s: float = 0.0,
        max_prompt_tokens: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """``others_tokens``: prompt tokens of other gateways that wait on workers, those of batch aside. ``patience_s``: to the
        first token of a request that names neither class nor targets; what its class promises, if that is longer.
        ``max_prompt_tokens``: of a prompt, what is computed at most.
        """
        self.clock = clock
        limits = limits or AdmissionLimits()
        self.control = AdmissionControl(limits)
        self._margin = limits.margin
        self._patience_s = patience_s
        self._others_tokens = others_tokens
        self._max_prompt_tokens = max_prompt_tokens
        self._turns: dict[Visit, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._chars_per_token = _CHARS_PER_TOKEN

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """What is let in inside of this, by whichever task, is over at its end."""
        tickets: list[Ticket] = []
        _TICKETS.set(tickets)
        try:
            yield
        finally:
            for ticket in tickets:
                ticket.end()

    async def enter(self, options: GenerationOptions, caller: Caller) -> Ticket | None:
        """Returns when the request's turn has come. Raises OVERLOADED at once where it would come too late, and
        DEADLINE_EXCEEDED when it has not come until the request's time was over.

        None outside of ``visiting``: nobody would say when it is over.
        """
        tickets = _TICKETS.get()
        if tickets is None:
            return None
        now_s, slo = self.clock(), caller.slo
        ttft_ms, tpot_ms = slo.promised_ttft_ms, slo.promised_tpot_ms
        if slo == SloTarget():  # who asked for nothing rather waits than comes again
            ttft_ms = max(self._patience_s * 1e3, ttft_ms or 0.0) / self._margin
            tpot_ms = None if tpot_ms is None else tpot_ms / self._margin
        visit = Visit(
            slo_class=SloClass(slo.slo_class),
            num_tokens=self._estimate(options),
            num_streams=options.num_choices,
            ttft_s=None if ttft_ms is None else caller.received_s + ttft_ms / 1e3 - now_s,
            tpot_s=None if tpot_ms is None else tpot_ms / 1e3,
            tenant=caller.tenant.tenant_id,
            priority=options.priority,
        )
        is_in = self.control.arrive(visit, now_s, others_tokens=self._others_tokens())
        ticket = Ticket(self, visit)
        tickets.append(ticket)
        if not is_in:
            turn = self._turns[visit] = asyncio.get_running_loop().create_future()
            self._look_later()
            try:
                async with asyncio.timeout(caller.timeout_s):
                    await turn
            except TimeoutError:
                message = "the request's time was over before its turn came"
                raise BatonError(ErrorCode.DEADLINE_EXCEEDED, message) from None
        return ticket

    def leave(self, visit: Visit) -> None:
        self._turns.pop(visit, None)
        self._let_in(self.control.end(visit, self.clock()))

    def _let_in(self, visits: list[Visit]) -> None:
        for entered in visits:
            turn = self._turns.pop(entered)
            if not turn.done():
                turn.set_result(None)

    def _look_later(self) -> None:
        """One timer while somebody waits whose turn may come although nobody ends."""
        wake_s = self.control.wake_s
        if self._timer is None and wake_s is not None and (delay_s := wake_s - self.clock()) > 0.0:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        self._timer = None
        self._let_in(self.control.look(self.clock()))
        self._look_later()

    def learn(self, prompts: tuple[Prompt, ...], num_tokens: int) -> None:
        """The prompts turned out to have so many tokens."""
        num_chars = sum(_num_chars(prompt) for prompt in prompts if not isinstance(prompt, TokenPrompt))
        if num_chars and num_tokens:
            ratio = num_chars / num_tokens
            self._chars_per_token += _BLEND * (ratio - self._chars_per_token)

    def _estimate(self, options: GenerationOptions) -> int:
        num_tokens = 0.0
        for prompt in options.prompts:
            if isinstance(prompt, TokenPrompt):
                size: float = len(prompt.token_ids)
            else:
                size = _num_chars(prompt) / self._chars_per_token
            num_tokens += min(size, self._max_prompt_tokens())  # a longer one is refused when it has been tokenised
        return _REQUEST_TOKENS + round(num_tokens)


def _num_chars(prompt: Prompt) -> int:
    if isinstance(prompt, TokenPrompt):
        return 0
    if not isinstance(prompt, ChatPrompt):
        return len(prompt.text)
    contents = (message.get("content") for message in prompt.messages)
    return sum(len(content) for content in contents if isinstance(content, str))
