"""Two cores on virtual time: real schedulers, router and cost learning around steps whose durations are a formula.

Nothing of it waits or computes, so a minute of an installation takes a second, and the same requests can be sent through every
placement.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.services.core.block_hash import BlockNamer
from baton.services.core.block_pool import BlockPool
from baton.services.core.candidates import Answer, Candidate, Placement, Role, RoutedRequest, WorkerView
from baton.services.core.cost_learning import CostBook
from baton.services.core.fetch import FetchPolicy
from baton.services.core.request import Request, RequestState, SampledToken, SamplingParams
from baton.services.core.router import route
from baton.services.core.scheduler.base import SchedulerLimits, SchedulerOutput, StepResult
from baton.services.core.scheduler.decode import DecodeScheduler
from baton.services.core.scheduler.pace import HANDOFF_MEMORY_S, Pace
from baton.services.core.scheduler.prefill import PrefillScheduler
from baton.services.core.slo import ServiceLevel, SloClass
from baton.services.worker.speed import Speed

NAMER = BlockNamer(b"key of the tests", "model")
BLOCK_SIZE = 16
REPORT_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds of a step with one thread: a floor, and what each token of a prompt and each stream adds."""

    step_s: float = 5e-3
    token_s: float = 330e-6
    stream_s: float = 0.6e-3
    transfer_s: float = 12e-3


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a workload, and what it is promised."""

    at_s: float
    input_len: int
    output_len: int
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(slots=True, eq=False)
class Story:
    """What became of a request."""

    ask: Ask
    chosen: Candidate | None = None
    second_s: float | None = None
    prefill_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.ask.at_s

    @property
    def tpot_s(self) -> float:
        assert self.first_s is not None
        return (self.last_s - self.first_s) / max(1, self.ask.output_len - 1)


@dataclass(slots=True, eq=False)
class SimpleWorker:
    """One worker, and what the gateway knows of it."""

    name: str
    role: Role
    scheduler: PrefillScheduler | DecodeScheduler
    speed: Speed
    is_stepping: bool = False
    report: tuple[int, int, float, float] = (0, 0, 0.0, 0.0)  # prompt tokens, requests, seconds a token, a step
    inflight_tokens: dict[str, int] = field(default_factory=dict)  # request -> prompt tokens that it computes there
    inflight: dict[str, float | None] = field(default_factory=dict)  # request -> its target of a token
    handed_over_s: float = -math.inf


class PlacementWorld:
    """One gateway before a few workers."""

    def __init__(self, roles: Sequence[Role], placement: Placement, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()
        self.placement = placement
        self.costs = CostBook()
        self.now = 0.0
        self.workers = [self._make(f"{role.value}-{number}", role) for number, role in enumerate(roles)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._stories: dict[str, Story] = {}
        self._level: dict[str, ServiceLevel] = {}

    def run(self, asks: Sequence[Ask]) -> list[Story]:
        """Everything is sent at its time; returns when all is over."""
        for number, ask in enumerate(asks):
            self._stories[f"r{number}"] = Story(ask)
            self._at(ask.at_s, lambda name=f"r{number}": self._arrive(name))  # type: ignore[misc]
        self._at(0.0, self._report)
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()
        return list(self._stories.values())

    def _make(self, name: str, role: Role) -> SimpleWorker:
        limits = SchedulerLimits(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=8192)
        make = PrefillScheduler if role is Role.PREFILL else DecodeScheduler
        machine = self.machine
        pace = Pace(machine.token_s, machine.step_s)
        scheduler = make(BlockPool(1 << 14, BLOCK_SIZE), NAMER, limits, enable_prefix_caching=False, pace=pace)
        speed = Speed(warm_step_s=machine.step_s, warm_s_per_token=machine.token_s)
        return SimpleWorker(name, role, scheduler, speed)

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), act))

    # The gateway.

    def view(self, worker: SimpleWorker) -> WorkerView:
        queued_tokens, running, token_s, step_s = worker.report
        num_inflight = len(worker.inflight)
        if worker.role is Role.PREFILL:
            running, num_inflight = 0, sum(self._is_whole(name) for name in worker.inflight)
        targets = [tpot_s for tpot_s in worker.inflight.values() if tpot_s is not None]
        return WorkerView(
            worker.name,
            worker.name,
            worker.role,
            worker.name,
            "same",
            "host",
            queued_tokens=max(queued_tokens, sum(worker.inflight_tokens.values())),
            running=max(running, num_inflight),
            cost=self.costs.cost(
                worker.name, worker.role.value, prefill_s_per_token=token_s, decode_step_s=step_s, now=self.now
            ),
            tightest_tpot_s=min(targets, default=None),
            answers_whole=worker.role is Role.PREFILL,
            gets_handoffs=worker.handed_over_s > self.now - HANDOFF_MEMORY_S,
        )

    def _arrive(self, name: str) -> None:
        story = self._stories[name]
        ask = story.ask
        routed = RoutedRequest(
            name,
            ask.input_len,
            BLOCK_SIZE,
            24576,
            {},
            fetch=FetchPolicy(),
            ttft_target_s=ask.ttft_s,
            tpot_target_s=ask.tpot_s,
            answer=Answer(ask.output_len, ask.output_len) if self.placement is Placement.AUTO else None,
        )
        views = [self.view(worker) for worker in self.workers]
        story.chosen = chosen = route(routed, views, self.placement, None, self.now).chosen
        decode = self._worker(chosen.decode.worker_id)
        prefill = decode if chosen.prefill is None else self._worker(chosen.prefill.worker_id)
        prefill.inflight_tokens[name] = ask.input_len
        prefill.inflight[name] = None
        decode.inflight[name] = ask.tpot_s
        due_s = None if ask.ttft_s is None else self.now + ask.ttft_s
        self._level[name] = ServiceLevel(SloClass.STANDARD, due_s, ask.tpot_s)
        request = self._request(name, ask.output_len)
        if isinstance(prefill.scheduler, PrefillScheduler):
            prefill.scheduler.add(request, is_whole=prefill is decode)
        else:
            prefill.scheduler.add(request)
        if prefill is not decode:
            decode.handed_over_s = self.now
        self._wake(prefill)

    def _is_whole(self, name: str) -> bool:
        """A prefill worker answers it."""
        chosen = self._stories[name].chosen
        return chosen is not None and chosen.decode.role is Role.PREFILL

    def _learn(self, name: str) -> None:
        """As the gateway does it when a request is over."""
        story = self._stories[name]
        ask, chosen = story.ask, story.chosen
        assert chosen is not None
        decode, prefiller, prefill_s = chosen.decode, chosen.prefill or chosen.decode, story.prefill_s
        prefill_s /= chosen.slowness
        self.costs.on_prefill(prefiller.worker_id, prefiller.role.value, ask.input_len, prefill_s, self.now)
        begun_s, num_steps, pool = story.first_s, ask.output_len - 1, decode.role.value
        if chosen.prefill is not None and story.second_s is not None:
            assert begun_s is not None
            self.costs.on_handoff(decode.worker_id, pool, story.second_s - begun_s, self.now)
            begun_s, num_steps = story.second_s, num_steps - 1
        if num_steps > 0:
            assert begun_s is not None
            step_s = (story.last_s - begun_s) / num_steps
            self.costs.on_decode(decode.worker_id, pool, decode.running + 1, step_s, self.now)

    def _report(self) -> None:
        for worker in self.workers:
            stats, speed = worker.scheduler.stats(), worker.speed
            num = stats.running + stats.queued
            worker.report = (stats.queued_tokens, num, speed.prefill_s_per_token, speed.decode_step_s)
        if self._events:
            self._at(self.now + REPORT_EVERY_S, self._report)

    # The workers.

    def _request(self, name: str, output_len: int, first: int | None = None) -> Request:
        story = self._stories[name]
        sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
        start = (int(name[1:]) + 1) * 8192
        tokens = list(range(start, start + story.ask.input_len))
        return Request(name, 1, tokens, len(tokens), sampling, arrival_s=self.now, service=self._level[name])

    def _worker(self, name: str) -> SimpleWorker:
        return next(worker for worker in self.workers if worker.name == name)

    def _wake(self, worker: SimpleWorker) -> None:
        if worker.is_stepping:
            return
        started_s = self.now
        output = worker.scheduler.schedule(started_s)
        if not output.scheduled:
            return
        for item in output.scheduled:
            name = item.request.request_id
            if worker.role is Role.PREFILL and not self._is_whole(name):
                self._reserve(name)
        prompts = [item for item in output.scheduled if item.request.is_prefilling]
        num_prompt = sum(item.num_tokens for item in prompts)
        num_streams = len(output.scheduled) - len(prompts)
        machine = self.machine
        step_s = machine.step_s + num_prompt * machine.token_s + num_streams * machine.stream_s
        worker.is_stepping = True
        self._at(started_s + step_s, lambda: self._end_step(worker, output, step_s, num_prompt, num_streams))

    def _end_step(
        self, worker: SimpleWorker, output: SchedulerOutput, step_s: float, num_prompt: int, num_streams: int
    ) -> None:
        worker.is_stepping = False
        sampled = {item.request.request_id: SampledToken(7) for item in output.scheduled if item.samples}
        worker.speed.observe(step_s, num_prompt, len(sampled), num_streams)
        for update in worker.scheduler.update(output, StepResult(sampled), self.now):
            name = update.request.request_id
            story = self._stories[name]
            if not update.new_tokens:
                continue
            if story.first_s is not None and story.second_s is None:
                story.second_s = self.now
            if story.first_s is None:
                story.first_s = self.now
                worker.inflight_tokens.pop(name, None)
                assert update.prefill is not None
                story.prefill_s = update.prefill.prefill_s
            story.last_s = self.now
            if update.handing_over:
                self._at(self.now + self.machine.transfer_s, lambda name=name: self._hand_over(worker, name))  # type: ignore[misc]
            elif update.finished:
                worker.inflight.pop(name, None)
                if story.chosen is not None and story.chosen.prefill is not None:
                    self._worker(story.chosen.decode.worker_id).inflight.pop(name, None)
                self._learn(name)
        self._wake(worker)

    def _hand_over(self, prefill: SimpleWorker, name: str) -> None:
        story = self._stories[name]
        assert story.chosen is not None
        decode = self._worker(story.chosen.decode.worker_id)
        assert isinstance(prefill.scheduler, PrefillScheduler)
        assert isinstance(decode.scheduler, DecodeScheduler)
        if decode.scheduler.phase(name) != RequestState.AWAITING_KV:
            self._at(self.now + self.machine.step_s, lambda: self._hand_over(prefill, name))
            return
        prefill.scheduler.release(name)
        prefill.inflight.pop(name, None)
        decode.scheduler.commit(name, SampledToken(7), self.now)
        self._wake(decode)

    def _reserve(self, name: str) -> None:
        """With the first chunk, as a prefill worker does."""
        story = self._stories[name]
        assert story.chosen is not None
        decode = self._worker(story.chosen.decode.worker_id)
        assert isinstance(decode.scheduler, DecodeScheduler)
        if decode.scheduler.phase(name) is None:
            request = self._request(name, story.ask.output_len)
            names = NAMER.names(request.token_ids, BLOCK_SIZE)
            decode.scheduler.reserve(request, names, self.now)  # or it is granted in a later step
