"""An open loop: every request is sent at its moment, in one asyncio process, and what becomes of it is written down."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

from baton.load.generator.prompts import PromptMaker, U
from baton.load.generator.records import Outcome, RequestRecord
from baton.load.generator.sender import History, RequestMaker, Sender, remember
from baton.load.generator.workload import Conversation, Turn

OnEnd = Callable[[RequestRecord], None]


@dataclass(slots=True)
class RunResult:
    """Records of all requests that were due, in the order in which they were due; and what the generator itself spent."""

    records: list[RequestRecord] = field(default_factory=list)
    duration_s: float = 0.0
    cpu_s: float = 0.0
    num_planned: int = 0
    num_given_up: int = 0  # under way when the run was interrupted
    is_interrupted: bool = False


class OpenLoop(Generic[U]):
    """One run."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        *,
        prompts: PromptMaker[U],
        requests: RequestMaker,
        make_sender: Callable[[Callable[[], float]], Sender],
        on_end: OnEnd = lambda _: None,
        max_concurrency: int | None = None,
        session_prefix: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._conversations = conversations
        self._prompts: PromptMaker[U] = prompts
        self._requests = requests
        self._make_sender = make_sender
        self._on_end = on_end
        self._slots = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
        self._session_prefix = session_prefix
        self._headers = dict(headers or {})
        self._start_s = 0.0
        self._records: list[RequestRecord] = []

    async def run(self, stop: asyncio.Event) -> RunResult:
        """Sends everything and waits for the answers; less when ``stop`` is set.

        The garbage collector rests meanwhile: it would stop the loop for milliseconds just when much is going on.
        """
        result = RunResult(num_planned=sum(len(one.turns) for one in self._conversations))
        gc.collect()
        gc.disable()
        cpu_start_s = time.process_time()
        self._start_s = time.perf_counter()
        sender = self._make_sender(self._now)
        work = asyncio.create_task(self._send_all(sender))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
            result.is_interrupted = not work.done()
            if work.done():
                work.result()
        finally:
            result.duration_s = self._now()
            result.cpu_s = time.process_time() - cpu_start_s
            stopping.cancel()
            work.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)
            gc.enable()
        finished = [record for record in self._records if record.ended_s is not None]
        result.num_given_up = len(self._records) - len(finished)
        result.records = sorted(finished, key=lambda record: (record.intended_s, record.index, record.turn))
        return result

    def _now(self) -> float:
        return time.perf_counter() - self._start_s

    async def _send_all(self, sender: Sender) -> None:
        async with asyncio.TaskGroup() as group:
            for conversation in self._conversations:
                # Made while there is time, not when it is due.
                history = History()
                body = self._body(history, conversation.turns[0])
                await self._sleep_until(conversation.at_s)
                group.create_task(self._converse(sender, conversation, history, body))

    async def _sleep_until(self, at_s: float) -> None:
        """Returns at ``at_s`` or later, never earlier: timers have milliseconds, and may be early by one."""
        while (left_s := at_s - self._now()) > 0:  # noqa: ASYNC110  the clock is what is waited for
            await asyncio.sleep(left_s)

    async def _converse(self, sender: Sender, conversation: Conversation, history: History, body: bytes) -> None:
        intended_s = conversation.at_s
        for number, turn in enumerate(conversation.turns):
            if number:
                body = self._body(history, turn)
                await self._sleep_until(intended_s)
            record = RequestRecord(
                conversation.index,
                number,
                intended_s,
                planned_input_len=turn.input_len,
                planned_output_len=turn.output_len,
            )
            self._records.append(record)
            record.started_s = self._now()
            headers = self._headers
            if len(conversation.turns) > 1:
                headers = headers | {"x-session-id": f"{self._session_prefix}-{conversation.index}"}
            async with self._slots:
                answer = await sender.send(record, body, headers)
            self._on_end(record)
            if record.outcome is not Outcome.COMPLETED:
                self._give_up_turns(conversation, number + 1, self._now())
                return
            remember(history, answer)
            if number + 1 < len(conversation.turns):
                intended_s = (record.ended_s or 0.0) + conversation.turns[number + 1].pause_s

    def _give_up_turns(self, conversation: Conversation, first: int, now_s: float) -> None:
        """The rest of a conversation without the answer that it builds on: due, and missed."""
        for number, turn in enumerate(conversation.turns[first:], first):
            record = RequestRecord(
                conversation.index,
                number,
                now_s,
                ended_s=now_s,
                outcome=Outcome.NOT_SENT,
                error="the turn before failed",
                planned_input_len=turn.input_len,
                planned_output_len=turn.output_len,
            )
            self._records.append(record)
            self._on_end(record)

    def _body(self, history: History, turn: Turn) -> bytes:
        return self._requests.body(history, self._prompts.units(turn.parts), turn.output_len)
