"""A prefill and a decode scheduler joined by transfers, over fake engines whose KV is a tag a token.

The tag of a token is a hash over everything before it, so a block that holds anything but the right prefix is noticed as
soon as it is read. The next token is a function of the last tag: what a request generates is known beforehand, and a
wrong block would change it.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field

from helpers.kv_tags import EOS, next_token, tags_of
from helpers.scheduling import BLOCK_SIZE, NAMER, make_limits

from baton.services.core.block_pool import BlockPool
from baton.services.core.request import FinishReason, Request, RequestState, SampledToken, SamplingParams
from baton.services.core.scheduler.base import RequestUpdate, Reservation, SchedulerOutput, StepResult
from baton.services.core.scheduler.decode import DecodeScheduler
from baton.services.core.scheduler.output_length import OutputLengthEstimator
from baton.services.core.scheduler.prefill import PrefillScheduler
from baton.services.core.slo import ServiceLevel

GARBAGE = -1
MAX_MODEL_LEN = 40
NUM_BLOCKS = 10  # exactly what the longest request needs


def expected_output(request: Request) -> list[int]:
    """What a lone, fault-free worker would generate."""
    token_ids = request.token_ids[: request.num_prompt_tokens]
    while len(token_ids) < min(request.max_total_tokens, MAX_MODEL_LEN):
        token_ids.append(next_token(token_ids, request.cache_salt))
        if token_ids[-1] == EOS and len(token_ids) - request.num_prompt_tokens >= request.sampling.min_tokens:
            break
    return token_ids[request.num_prompt_tokens :]


@dataclass(eq=False)
class Worker:
    """A scheduler, its blocks' contents, and an engine that only moves tags."""

    scheduler: PrefillScheduler | DecodeScheduler
    memory: list[list[int]] = field(default_factory=lambda: [[GARBAGE] * BLOCK_SIZE for _ in range(NUM_BLOCKS)])
    tables: dict[Request, list[int]] = field(default_factory=dict)  # last seen, to find out that they only grow

    def step(self, now: float) -> tuple[SchedulerOutput, list[RequestUpdate]]:
        output = self.scheduler.schedule(now)
        self._check_decision(output)
        for item in output.scheduled:
            self._compute(item.request, item.num_tokens)
        sampled = {
            item.request.request_id: SampledToken(next_token(item.request.token_ids, item.request.cache_salt))
            for item in output.scheduled
            if item.samples
        }
        return output, self.scheduler.update(output, StepResult(sampled), now)

    def read(self, request: Request, num_tokens: int) -> None:
        """Fails where the cache does not hold what the request's first tokens stand for."""
        tags = tags_of(request.token_ids[:num_tokens], request.cache_salt)
        for position, tag in enumerate(tags):
            block_id = request.block_table[position // BLOCK_SIZE]
            assert self.memory[block_id][position % BLOCK_SIZE] == tag, f"{request.request_id} reads a foreign block"

    def _compute(self, request: Request, num_tokens: int) -> None:
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
        self.read(request, start)
        refs = {entry.block_id: entry.request_refs for entry in self.scheduler.pool.ledger()}
        for position, tag in enumerate(tags_of(request.token_ids[:end], request.cache_salt)):
            if position >= start:
                block_id = request.block_table[position // BLOCK_SIZE]
                assert refs[block_id] == 1, f"{request.request_id} writes into a block that another one reads"
                self.memory[block_id][position % BLOCK_SIZE] = tag

    def _check_decision(self, output: SchedulerOutput) -> None:
        limits = self.scheduler.limits
        requests = [item.request for item in output.scheduled]
        assert len(set(requests)) == len(requests) <= limits.max_num_seqs
        assert output.num_tokens <= limits.max_num_batched_tokens
        assert not set(requests) & {*output.preempted, *output.expired}
        for item in output.scheduled:
            request = item.request
            assert request.state is RequestState.RUNNING
            assert 1 <= item.num_tokens <= request.num_uncomputed_tokens
            assert len(request.block_table) * BLOCK_SIZE >= request.num_computed_tokens + item.num_tokens
            if request.num_computed_tokens and self.tables.get(request):
                before = self.tables[request]
                assert request.block_table[: len(before)] == before, "block tables are append-only"
            self.tables[request] = list(request.block_table)
        for request in output.preempted:
            assert not request.block_table
            self.tables.pop(request, None)


@dataclass(eq=False)
class Handoff:
    """One request on its way from P to D, as gateway and transfer agents see it."""

    sender: Request
    receiver: Request
    complete: dict[int, int] = field(default_factory=dict)  # index -> P's block, as far as it was reported
    sent: set[int] = field(default_factory=set)
    reservation: Reservation | None = None
    asked: bool = False
    first_token: SampledToken | None = None
    quiet: bool = True  # no write of an aborted transfer can land any more


class World:
    """Both workers and all handoffs. Every action is one small event, so that a test may order them as it likes."""

    def __init__(self, *, quantile_tokens: int = 4, prefix_caching: bool = True) -> None:
        limits = make_limits(max_num_seqs=3, max_num_batched_tokens=8, max_model_len=MAX_MODEL_LEN)
        pools = [BlockPool(NUM_BLOCKS, BLOCK_SIZE) for _ in range(2)]
        self.prefill = PrefillScheduler(pools[0], NAMER, limits, enable_prefix_caching=prefix_caching)
        self.decode = DecodeScheduler(
            pools[1],
            NAMER,
            limits,
            output_lengths=OutputLengthEstimator(prior_tokens=quantile_tokens),
            enable_prefix_caching=prefix_caching,
        )
        self.p, self.d = Worker(self.prefill), Worker(self.decode)
        self.now = 0.0
        self.handoffs: list[Handoff] = []
        self.requests: list[Request] = []  # everything ever started on D, or on P alone
        self.ends: Counter[Request] = Counter()
        self.outputs: dict[Request, list[int]] = {}
        self.quarantines: list[Handoff] = []
        self.lingering: list[Handoff] = []  # cancelled, but their transfers have not let go on either side
        self.num_preemptions = self.num_cached_tokens = 0

    def make_request(
        self,
        prompt: list[int],
        max_tokens: int,
        salt: str,
        lifetime_s: float | None,
        attempt: int = 1,
        service: ServiceLevel | None = None,
    ) -> Request:
        return Request(
            f"r{len(self.requests)}",
            attempt,
            list(prompt),
            len(prompt),
            SamplingParams(max_tokens=max_tokens, eos_token_ids=frozenset({EOS}), min_tokens=min(2, max_tokens)),
            cache_salt=salt,
            arrival_s=self.now,
            deadline_s=None if lifetime_s is None else self.now + lifetime_s,
            service=service or ServiceLevel(),
        )

    def _track(self, request: Request) -> None:
        self.requests.append(request)
        self.outputs[request] = []

    def start_local(
        self,
        prompt: list[int],
        max_tokens: int,
        salt: str,
        lifetime_s: float | None,
        service: ServiceLevel | None = None,
        *,
        is_whole: bool = False,
    ) -> None:
        """The decode worker computes the prompt itself, or, ``is_whole``, the prefill worker answers it."""
        request = self.make_request(prompt, max_tokens, salt, lifetime_s, service=service)
        self._track(request)
        if is_whole:
            self.prefill.add(request, is_whole=True)
        else:
            self.decode.add(request)

    start_whole = functools.partialmethod(start_local, is_whole=True)

    def start_remote(
        self,
        prompt: list[int],
        max_tokens: int,
        salt: str,
        lifetime_s: float | None,
        service: ServiceLevel | None = None,
    ) -> None:
        sender = self.make_request(prompt, max_tokens, salt, lifetime_s, service=service)
        receiver = self.make_request(prompt, max_tokens, salt, lifetime_s, service=service)
        self._track(receiver)
        self.prefill.add(sender)
        self.handoffs.append(Handoff(sender, receiver))

    def step_prefill(self) -> None:
        output, updates = self.p.step(self.now)
        by_sender = {handoff.sender: handoff for handoff in self.handoffs}
        assert not output.preempted
        for request in output.expired:
            if request in by_sender:
                self._give_up(by_sender[request])
            else:
                self._end(request)
        for update in updates:
            handoff = by_sender.get(update.request)
            if handoff is None:
                if update.request in self.outputs:
                    self._note(update)
                continue
            handoff.complete |= dict(zip(update.completed_blocks, update.completed_block_ids, strict=True))
            if update.handing_over:
                [handoff.first_token] = update.new_tokens
            if update.finished:
                self.outputs[handoff.receiver] += [token.token_id for token in update.new_tokens]
                self._give_up(handoff, ended_well=True)

    def step_decode(self) -> None:
        output, updates = self.d.step(self.now)
        by_receiver = {handoff.receiver: handoff for handoff in self.handoffs}
        for reservation in output.granted:
            self._granted(by_receiver[reservation.request], reservation)
        for request in output.expired:
            if request in by_receiver:
                self._give_up(by_receiver[request], ended_on_decode=True)
            self._end(request)
        self.num_preemptions += len(output.preempted)
        for update in updates:
            self._note(update)

    def _note(self, update: RequestUpdate) -> None:
        """Of a request that generates where it runs."""
        assert update.first_index == len(self.outputs[update.request]), "indices never repeat or skip"
        self.outputs[update.request] += [token.token_id for token in update.new_tokens]
        if update.prefill is not None:
            self.num_cached_tokens += update.prefill.num_cached_tokens
        if update.finished:
            self._end(update.request)

    def reserve(self, handoff: Handoff) -> None:
        """As the sender does: not before its own scheduler has admitted the prompt."""
        if handoff.asked or handoff.sender.state is RequestState.WAITING:
            return
        if not self.prefill.is_handed_over(handoff.sender) and handoff.first_token is None:
            return  # it will end where it is
        handoff.asked = True
        names = self.prefill.block_names(handoff.sender.request_id)
        reservation = self.decode.reserve(handoff.receiver, names, self.now)
        if reservation is not None:
            self._granted(handoff, reservation)

    def push(self, handoff: Handoff) -> None:
        """Sends the next block that is complete and wanted."""
        if handoff.reservation is None:
            return
        for slot in handoff.reservation.slots:
            if slot.index in handoff.complete and slot.index not in handoff.sent:
                assert self.decode.pool.generation(slot.block_id) == slot.generation
                source = self.p.memory[handoff.complete[slot.index]]
                tags = tags_of(handoff.receiver.token_ids, handoff.receiver.cache_salt)
                wanted = tags[slot.index * BLOCK_SIZE : (slot.index + 1) * BLOCK_SIZE]
                assert source[: len(wanted)] == wanted, "a pinned block was reused under a transfer"
                self.d.memory[slot.block_id] = source[: len(wanted)] + [GARBAGE] * (BLOCK_SIZE - len(wanted))
                handoff.sent.add(slot.index)
                return

    def commit(self, handoff: Handoff) -> bool:
        if handoff.reservation is None or handoff.first_token is None:
            return False
        if handoff.sent != {slot.index for slot in handoff.reservation.slots}:
            return False
        self.outputs[handoff.receiver].append(handoff.first_token.token_id)
        self.num_cached_tokens += handoff.reservation.num_cached_tokens
        request = self.decode.commit(handoff.receiver.request_id, handoff.first_token, self.now)
        self.d.read(request, request.num_computed_tokens)
        self.prefill.release(handoff.sender.request_id, handoff.sender.attempt)
        self.handoffs.remove(handoff)
        return True

    def cancel(self, request: Request) -> None:
        """The client has gone: the gateway tells both workers."""
        handoff = next((h for h in self.handoffs if h.receiver is request), None)
        if handoff is not None:
            self.handoffs.remove(handoff)
            self.prefill.abort(request.request_id)
            self.decode.abort(request.request_id)
            self.lingering.append(handoff)
            self._end(request)
        elif (ended := self.decode.abort(request.request_id) or self.prefill.abort(request.request_id)) is not None:
            self._end(ended)  # it, or its retry under the same id

    def break_transfer(self, handoff: Handoff, *, quiet: bool) -> None:
        """The transfer fails. The gateway falls back to a prefill on D."""
        request_id = handoff.receiver.request_id
        self.handoffs.remove(handoff)
        self.prefill.abort(request_id)
        self.prefill.release(request_id, handoff.sender.attempt)
        self.decode.abort_reservation(request_id, writes_quiet=quiet, now=self.now)
        if not quiet and handoff.reservation is not None and handoff.reservation.slots:
            self.quarantines.append(handoff)
        self._end(handoff.receiver)
        retry = self.make_request(
            handoff.receiver.token_ids,
            handoff.receiver.sampling.max_tokens,
            handoff.receiver.cache_salt,
            None,
            attempt=2,
            service=handoff.receiver.service,
        )
        retry.request_id = request_id
        self._track(retry)
        self.decode.add(retry)

    def late_write(self, handoff: Handoff) -> None:
        """A one-sided write of a transfer that gave up lands where it was once allowed."""
        assert handoff.reservation is not None
        for slot in handoff.reservation.slots:
            self.d.memory[slot.block_id] = [GARBAGE] * BLOCK_SIZE

    def let_go(self, handoff: Handoff) -> None:
        """The transfer of a cancelled request ends; until now it could read P's blocks and write into D's."""
        self.lingering.remove(handoff)
        tags = tags_of(handoff.sender.token_ids[: handoff.sender.num_prompt_tokens], handoff.sender.cache_salt)
        for index, block_id in handoff.complete.items():
            wanted = tags[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
            assert self.p.memory[block_id][: len(wanted)] == wanted, "a block was reused under a transfer"
        if handoff.reservation is not None:
            self.late_write(handoff)
        self.prefill.release(handoff.sender.request_id, handoff.sender.attempt)
        self.decode.abort_reservation(handoff.receiver.request_id, writes_quiet=True, now=self.now, attempt=1)

    def end_quarantine(self, handoff: Handoff) -> None:
        self.quarantines.remove(handoff)
        self.decode.release_quarantine(handoff.receiver.request_id, handoff.receiver.attempt)

    def drain(self, patience: int = 20) -> None:
        """Everything that is in flight ends. Fails where so many rounds bring neither a token nor an end."""
        for handoff in tuple(self.quarantines):
            self.late_write(handoff)
            self.end_quarantine(handoff)
        for handoff in tuple(self.lingering):
            self.let_go(handoff)
        progress, num_idle_rounds = (0, 0), 0
        while self.handoffs or self.prefill.has_work or self.decode.has_work:
            self.step_prefill()
            for handoff in tuple(self.handoffs):
                self.reserve(handoff)
                for _ in range(NUM_BLOCKS):
                    self.push(handoff)
                self.commit(handoff)
            self.step_decode()
            before, progress = progress, (sum(map(len, self.outputs.values())), self.ends.total())
            num_idle_rounds = num_idle_rounds + 1 if progress == before else 0
            assert num_idle_rounds < patience, f"no progress: {self.prefill.stats()}, {self.decode.stats()}"

    def check(self) -> None:
        """What holds at every moment."""
        for worker in (self.p, self.d):
            assert worker.scheduler.pool.check_integrity() == 0

    def check_end(self) -> None:
        """What holds when nothing is in flight."""
        for scheduler in (self.prefill, self.decode):
            counts = scheduler.pool.counts()
            assert (counts.request, counts.transfer, counts.quarantine, counts.error) == (0, 0, 0, 0)
            assert scheduler.pool.overdue(self.now + 1e9) == 0
            stats = scheduler.stats()
            assert (stats.queued, stats.running, stats.queued_tokens) == (0, 0, 0)
            assert (stats.awaiting_kv, stats.handing_over, stats.answering) == (0, 0, 0)
        for request in self.requests:
            assert self.ends[request] == 1, f"{request.request_id} ended {self.ends[request]} times"
            expected, generated = expected_output(request), self.outputs[request]
            if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert generated == expected
            else:
                assert generated == expected[: len(generated)]

    def _granted(self, handoff: Handoff, reservation: Reservation) -> None:
        assert handoff.reservation is None
        handoff.reservation = reservation
        for slot in reservation.slots:
            self.d.memory[slot.block_id] = [GARBAGE] * BLOCK_SIZE

    def _give_up(self, handoff: Handoff, *, ended_well: bool = False, ended_on_decode: bool = False) -> None:
        """Ends a handoff on both sides, each told once by the gateway and once by its transfer agent."""
        self.handoffs.remove(handoff)
        request_id = handoff.receiver.request_id
        self.prefill.abort(request_id)
        self.prefill.release(request_id, handoff.sender.attempt)
        self.decode.abort(request_id)
        self.decode.abort_reservation(request_id, writes_quiet=True, now=self.now)
        if ended_well:
            handoff.receiver.finish_reason = handoff.sender.finish_reason
        if not ended_on_decode:
            self._end(handoff.receiver)

    def _end(self, request: Request) -> None:
        self.ends[request] += 1
