"""What prefill and decode workers share: sessions with gateways, the requests that run, the step thread, draining."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Generic

import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.kvtransfer.agent import TransferAgent
from baton.kvtransfer.identity import HandoffKey
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import Request
from baton.services.core.scheduler.base import RequestUpdate, Reservation
from baton.services.core.scheduler.finish import check_can_be_served
from baton.services.runtime import convert
from baton.services.runtime.failpoints import reach
from baton.services.worker.fetching import BlockFetcher
from baton.services.worker.parts import WorkerParts
from baton.services.worker.requests import ActiveRequest, failure_output, scheduler_id
from baton.services.worker.session import PlainTokens, Session
from baton.services.worker.speed import Speed
from baton.services.worker.step_loop import SchedulerT, StepEvents, StepLoop

log = structlog.get_logger(__name__)

# What follows a request's end takes milliseconds. A peer that does not answer learns it from the end of a lease as well.
_SETTLE_S = 3.0
# What peers fetch from here ends when they have it or give it up; their patience is shorter.
_GIVE_S = 30.0


class Worker(ABC, Generic[SchedulerT]):
    """Lives on the event loop; everything about blocks and batches happens on the step thread."""

    claim_failpoint: ClassVar[str]

    def __init__(
        self,
        parts: WorkerParts,
        scheduler: SchedulerT,
        *,
        on_turn: Callable[[SchedulerT, float], None],
        clock: Callable[[], float],
    ) -> None:
        self.identity = parts.identity
        self.limits = parts.limits
        self.speed = Speed()
        self.is_draining = False
        self.broken = asyncio.Event()  # the step loop cannot go on
        self.agent: TransferAgent  # set by the host before anything starts: the agent needs to know the worker as well
        self._parts = parts
        self._clock = clock
        self._active: dict[str, ActiveRequest] = {}
        self._sessions: set[Session] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        # Requests that wait for cached blocks, or for their grammar, before they are queued.
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._emptied = asyncio.Event()
        self._emptied.set()
        self.steps: StepLoop[SchedulerT] = parts.step_loop(
            scheduler,
            parts.engine,
            loop=asyncio.get_running_loop(),
            on_events=self._on_events,
            on_turn=on_turn,
            on_broken=self._on_broken,
            clock=clock,
        )
        self.fetcher = BlockFetcher(self.steps, parts.pool.block_size, clock)

    @property
    def incarnation(self) -> str:
        return self.identity.incarnation

    @property
    def num_active(self) -> int:
        return len(self._active)

    def now_s(self) -> float:
        """On the clock that deadlines are on."""
        return self._clock()

    def expected_step_s(self) -> float | None:
        """Of the step that is being computed; 0.0 without one. May be asked from any thread."""
        load = self.steps.load
        return 0.0 if load is None else self.speed.expected_step_s(*load)

    # Called by the stream.

    def open_session(self, gateway: pb.WorkerIdentity) -> Session:
        session = Session(gateway)
        self._sessions.add(session)
        return session

    def close_session(self, session: Session) -> None:
        """The gateway is gone or has hung up: nobody waits for its requests any more."""
        self._sessions.discard(session)
        for active in [active for active in self._active.values() if active.session is session]:
            self._give_up(active, "the gateway's stream ended")

    def cancel(self, session: Session, request_id: str, attempt: int) -> None:
        active = self._active.get(scheduler_id(request_id, attempt))
        if active is not None and active.session is session:
            self._give_up(active, "cancelled by the gateway")

    def admit(self, session: Session, spec: pb.GenerationSpec) -> ActiveRequest | None:
        """Takes a request in. What is wrong with it goes back on the stream; the stream itself lives on."""
        try:
            request = self._check(spec)
        except BatonError as error:
            session.send([failure_output(spec.request_id, spec.attempt, error)])
            return None
        active = ActiveRequest(session, spec.request_id, spec.attempt, request, spec.handle)
        self._active[active.id] = active
        self._emptied.clear()
        num_tokens = len(spec.token_ids)
        log.debug("request taken in", request_id=spec.request_id, attempt=spec.attempt, num_tokens=num_tokens)
        if self._parts.grammars is not None and request.sampling.grammar is not None:
            self._parts.grammars.prepare(request.sampling.grammar, request.sampling.eos_token_ids)
        return active

    def _check(self, spec: pb.GenerationSpec) -> Request:
        reach(self.claim_failpoint, lambda: spec.token_ids)
        if self.is_draining:
            raise BatonError(ErrorCode.DRAINING, "this worker is draining", retryable=True)
        request = convert.request_from_wire(spec, self._clock(), self._parts.vocab_size)
        request.request_id = scheduler_id(spec.request_id, spec.attempt)
        if request.request_id in self._active:
            raise BatonError(ErrorCode.INVALID_REQUEST, f"request {request.request_id} is already running")
        # The scheduler checks again; but names of blocks are not computed for what is far too long anyway.
        check_can_be_served(request, self._parts.pool, self.limits.max_model_len, request.num_tokens)
        return request

    def block_names(self, request: Request) -> list[bytes]:
        """Names of the blocks of the request's tokens."""
        return self._parts.namer.names(request.token_ids, self._parts.pool.block_size, request.cache_salt)

    # For the two kinds of worker.

    @abstractmethod
    def _give_up(self, active: ActiveRequest, reason: str) -> None:
        """Frees everything that the request holds here and at its peer. The gateway wants to hear no more of it."""

    @abstractmethod
    def peers(self) -> dict[str, str]:
        """The worker at the other end of each handoff of a request, by the request's name here."""

    @abstractmethod
    def renew_leases(self) -> None:
        """Blocks of transfers that are under way are not overdue. Called a few times in a lease."""

    def _on_started(self, active: ActiveRequest) -> None:
        """The first step that computes for the request begins."""

    def _on_granted(self, reservation: Reservation) -> None:
        """A reservation that had to wait has its blocks."""

    @abstractmethod
    def _on_update(self, active: ActiveRequest, update: RequestUpdate) -> pb.RequestOutput | PlainTokens | None:
        """The request got further; returns what the gateway is told."""

    def _tell_tokens(self, active: ActiveRequest, update: RequestUpdate) -> pb.RequestOutput | PlainTokens | None:
        """The same for one that generates here."""
        if not update.new_tokens and not update.finished:
            return None
        if update.finished:
            self.forget(active)
        return active.output(update)

    def fetch_and_enqueue(self, active: ActiveRequest, source: pb.FetchSource) -> None:
        """Queues the request once the blocks that another worker holds are here, or will not be."""
        # Who wants the logprobs of every prompt token computes all of them anyway.
        if not self._parts.prefix_caching or active.request.sampling.num_prompt_logprobs is not None:
            self.enqueue(active)
        else:
            task = self.spawn(self._fetch_and_enqueue(active, source), name=f"fetch-{active.id}")
            self._preparing[active.id] = task

    async def _fetch_and_enqueue(self, active: ActiveRequest, source: pb.FetchSource) -> None:
        names = self.block_names(active.request)
        # The last token is computed here in any case, so a block that it fills is of no use.
        names = names[: (active.request.num_tokens - 1) // self._parts.pool.block_size]
        key = HandoffKey(active.request_id, active.attempt)
        report = await self.fetcher.fetch(key, source, names, active.request.deadline_s, active.request.service)
        del self._preparing[active.id]
        if report is not None:
            active.session.send([pb.RequestOutput(request_id=active.request_id, attempt=active.attempt, fetch=report)])
        self.enqueue(active)

    async def compiled(self, request: Request) -> None:
        """Returns when the request's grammar, if any, is ready to be used. Raises BatonError where it never will be."""
        if self._parts.grammars is not None and request.sampling.grammar is not None:
            ready = self._parts.grammars.prepare(request.sampling.grammar, request.sampling.eos_token_ids)
            await asyncio.wrap_future(ready)

    def enqueue(self, active: ActiveRequest) -> None:
        """Queues the request with the scheduler, once its grammar is compiled. A refusal ends it with an error output."""
        if active.request.sampling.grammar is None:
            self._enqueue(active)
        else:
            task = self.spawn(self._compile_and_enqueue(active), name=f"compile-{active.id}")
            self._preparing[active.id] = task

    async def _compile_and_enqueue(self, active: ActiveRequest) -> None:
        try:
            await self.compiled(active.request)
        except BatonError as error:
            del self._preparing[active.id]
            self.fail(active, error)
            return
        del self._preparing[active.id]
        self._enqueue(active)

    def _enqueue(self, active: ActiveRequest) -> None:
        # Now, not when the task begins: whoever gives the request up before that would abort what is added later.
        added = self.steps.call(self._adding(active))
        self.spawn(self._confirm(active, added), name=f"enqueue-{active.id}")

    def _adding(self, active: ActiveRequest) -> Callable[[SchedulerT], None]:
        """Queues the request; called on the step thread."""
        return lambda scheduler: scheduler.add(active.request)

    async def _confirm(self, active: ActiveRequest, added: asyncio.Future[None]) -> None:
        try:
            await added
        except BatonError as error:
            self.fail(active, error)

    def fail(self, active: ActiveRequest, error: BatonError) -> None:
        """Ends a request with an error, here and at its gateway. Its blocks are the caller's business."""
        if self.forget(active):
            active.session.send([active.failure(error)])

    def forget(self, active: ActiveRequest) -> bool:
        """Takes the request off the list. False when it was off already."""
        was_active = self._active.pop(active.id, None) is not None
        if (fetch := self._preparing.pop(active.id, None)) is not None:
            fetch.cancel()
        if not self._active:
            self._emptied.set()
        if was_active:
            log.debug("request over", request_id=active.request_id, attempt=active.attempt)
        return was_active

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Runs ``work`` beside everything else. A failure is a bug, and is logged as one."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("task failed", task=task.get_name(), exc_info=task.exception())

    # From the step thread.

    def _on_events(self, events: StepEvents) -> None:
        for request in events.started:
            if (active := self._active.get(request.request_id)) is not None:
                self._on_started(active)
        for reservation in events.granted:
            self._on_granted(reservation)
        outputs: dict[Session, list[pb.RequestOutput | PlainTokens]] = {}
        for update in events.updates:
            active = self._active.get(update.request.request_id)
            if active is None:
                continue
            output = self._on_update(active, update)
            if output is not None:
                outputs.setdefault(active.session, []).append(output)
        for session, session_outputs in outputs.items():
            session.send(session_outputs)
        for request in events.expired:
            self._end_with_error(
                request, BatonError(ErrorCode.DEADLINE_EXCEEDED, "the request's time was over before it could run")
            )
        for request, problem in events.failed:
            self._end_with_error(request, problem)
        self.speed.observe(events.step_s, events.num_prompt_tokens, events.num_sampled, events.num_generating)

    def _end_with_error(self, request: Request, error: BatonError) -> None:
        active = self._active.get(request.request_id)
        if active is not None:
            active.session.send([active.failure(error)])
            self._give_up(active, error.message)

    def _on_broken(self, reason: str) -> None:
        log.error("the step loop is broken", reason=reason)
        self.broken.set()

    # Ending.

    async def drain(self) -> None:
        """Refuses what is new and returns when nothing runs any more. How long that may take is for the caller to say; what
        follows has its own time, so that no stuck part of it holds up the rest."""
        self.is_draining = True
        await self._emptied.wait()
        await self._settle()
        try:
            async with asyncio.timeout(_GIVE_S):
                await self.fetcher.drain()
        except TimeoutError:
            log.error("blocks that a peer asked for are still held", after_s=_GIVE_S)

    async def _settle(self) -> None:
        """Waits for what follows a request's end: aborts that peers must hear."""
        until_s = asyncio.get_running_loop().time() + _SETTLE_S
        while self._tasks and (left_s := until_s - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(self._tasks, timeout=left_s)
        if self._tasks:
            log.error("not waited for any longer", tasks=sorted(task.get_name() for task in self._tasks))

    async def stop_requests(self) -> int:
        """Gives up what is left and returns, when the peers know, how many requests that were."""
        self.is_draining = True
        left = list(self._active.values())
        for active in left:
            error = BatonError(ErrorCode.DRAINING, "the worker is stopping", retryable=True)
            active.session.send([active.failure(error)])
            self._give_up(active, error.message)
        await self._settle()
        return len(left)
