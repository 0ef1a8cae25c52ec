"""Clients: what they ask, when they leave, what they got, and whether it was right."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from helpers.simulation.gateway import SimGateway
from helpers.simulation.model import expected_tokens
from helpers.simulation.trace import Trace

from baton.services.core.errors import BatonError
from baton.services.core.lifecycle import Instant
from baton.services.core.request import SamplingParams
from baton.services.core.tenants import ANONYMOUS, Tenant
from baton.services.gateway.generation import GenerationRequest, SloTarget

# How long after its deadline a request may still be open.
GRACE_S = 5.0


@dataclass
class Ask:
    """One request as its client makes it."""

    name: str
    at_s: float
    prompt: list[int]
    sampling: SamplingParams
    salt: str
    timeout_s: float
    leaves_after_s: float | None = None  # the client hangs up
    slo: SloTarget = field(default_factory=SloTarget)
    tenant: Tenant = ANONYMOUS
    stops_after: int | None = None  # the API layer finds a stop string after so many tokens


@dataclass
class Got:
    """What came of it. ``end`` is set once."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    end: str | None = None
    code: str | None = None
    message: str = ""
    started_s: float = 0.0
    ended_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        return self.end == "error"

    def check_tokens(self) -> list[str]:
        """Problems of what was delivered: wrong, doubled, missing."""
        ask = self.ask
        expected, reason = expected_tokens(ask.prompt, ask.sampling, ask.salt)
        problems = list(self.problems)
        if self.tokens != expected[: len(self.tokens)]:
            wrong = next(
                (i for i, (a, b) in enumerate(zip(self.tokens, expected, strict=False)) if a != b), len(expected)
            )
            problems.append(f"I5 {ask.name}: token {wrong} of {self.tokens} is wrong, expected {expected}")
        if self.end in ("stop", "length") and (self.tokens != expected or self.end != reason):
            problems.append(
                f"I5 {ask.name}: ended with {self.end} after {len(self.tokens)} of {len(expected)} ({reason})"
            )
        return problems


class Client:
    """Runs one Ask against the gateway, inside its process, as a handler of its REST API would."""

    def __init__(self, ask: Ask, gateway: SimGateway, trace: Trace) -> None:
        self.got = Got(ask)
        self._gateway = gateway
        self._trace = trace
        self._finished = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    async def run(self) -> Got:
        loop = asyncio.get_running_loop()
        got, ask = self.got, self.got.ask
        await asyncio.sleep(max(0.0, ask.at_s - loop.time()))
        got.started_s = loop.time()
        process = self._gateway.process
        if process is None or not process.is_alive:
            self._end("not accepted")
        else:
            self._trace.note("client", f"{ask.name}: {len(ask.prompt)} tokens, up to {ask.sampling.max_tokens} more")
            self._task = process.run(self._handle(), name=f"handle-{ask.name}")
            if ask.leaves_after_s is not None:
                loop.call_later(ask.leaves_after_s, self._leave)
        await self._finished
        return got

    def gateway_lost(self) -> None:
        """The gateway's process is gone, and the connection with it."""
        if self.got.end is None and self._task is not None:
            self._end("gateway lost")

    def _leave(self) -> None:
        if self.got.end is None and self._task is not None:
            self._trace.note("client", f"{self.got.ask.name}: leaves")
            self._task.cancel()

    def _end(self, how: str, error: BaseException | None = None) -> None:
        got = self.got
        if got.end is not None:
            got.problems.append(f"I1 {got.ask.name}: ended as {got.end} and again as {how}")
            return
        got.end = how
        got.ended_s = asyncio.get_running_loop().time()
        if error is not None:
            got.message = str(error)
            got.code = error.code.value if isinstance(error, BatonError) else repr(error)
            if not isinstance(error, BatonError):
                got.problems.append(f"I8 {got.ask.name}: failed with {error!r}")
        self._trace.note("client", f"{got.ask.name}: {how} {got.code or ''} {got.message} ({len(got.tokens)} tokens)")
        self._finished.set_result(None)

    async def _handle(self) -> None:
        got, ask = self.got, self.got.ask
        request = GenerationRequest(
            f"{ask.name}.0",
            ask.name,
            "sim",
            list(ask.prompt),
            replace(ask.sampling),
            ask.salt,
            slo=ask.slo,
            timeout_s=ask.timeout_s,
            tenant=ask.tenant,
        )
        for instant in (Instant.RECEIVED, Instant.ADMITTED, Instant.TOKENIZED):  # what the API layer does
            request.trace.mark(instant, asyncio.get_running_loop().time())
        dispatcher = self._gateway.dispatcher
        end = None
        try:
            async with aclosing(dispatcher.generate(request)) as deltas:
                async for delta in deltas:
                    if end is not None:
                        got.problems.append(f"I1 {ask.name}: more after the end")
                    if delta.first_index != len(got.tokens):
                        got.problems.append(f"I2 {ask.name}: index {delta.first_index} after {len(got.tokens)} tokens")
                    got.tokens += [token.token_id for token in delta.tokens]
                    if delta.finish_reason is not None:
                        end = delta.finish_reason.value
                    elif ask.stops_after is not None and len(got.tokens) >= ask.stops_after:
                        dispatcher.finish(request, "stop", len(got.tokens))
                        end = "stopped"
                        break
        except asyncio.CancelledError:
            self._end("left")
            raise
        except Exception as error:
            self._end("error", error)
            return
        if end is None:
            got.problems.append(f"I1 {ask.name}: the stream ended without a finish reason")
        self._end(end or "nothing")
