"""A dispatcher, scripted workers behind it, and what ended."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from helpers.scripted_worker import Behaviour, ScriptedWorker, run_worker
from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.cost_learning import CostBook
from baton.services.core.errors import ErrorCode
from baton.services.core.fetch import FetchPolicy
from baton.services.core.ladder_steps import LadderLimits
from baton.services.core.lifecycle import Instant
from baton.services.core.links import LinkMatrix
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.request import FinishReason, SamplingParams
from baton.services.core.router import Placement, Role
from baton.services.gateway.dispatch import WorkerDispatcher
from baton.services.gateway.generation import GenerationRequest
from baton.services.gateway.receipts import GenerationRecord, ReceiptBook
from baton.services.gateway.registry import Registry
from baton.services.gateway.worker_link import WorkerLink

GATEWAY = pb.WorkerIdentity(worker_id="gateway", incarnation="g")
BLOCK_KEY = b"key"
PROMPT = list(range(1, 21))
NUM_TOKENS = 4
TRANSFER = pb.TransferReport(transport="shm", num_blocks=2, num_bytes=200, duration_ms=1.0)
_ids = itertools.count()


def whole(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    """A decode worker that prefills itself, or goes on: tokens are 100 + index."""
    first = len(spec.token_ids) - spec.num_prompt_tokens
    worker.say(
        spec, first, *range(100 + first, 100 + NUM_TOKENS), finish_reason=pb.FINISH_REASON_LENGTH,
        prefill=pb.PrefillReport(cached_tokens=16),
    )  # fmt: skip


def hand_over(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    """A prefill worker whose handoff works."""
    first = len(spec.token_ids) - spec.num_prompt_tokens
    worker.say(spec, first, 100 + first)
    worker.say(spec, 0, handed_over=True)


def take_over(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    """A decode worker that gets the blocks, or prefills itself."""
    if not worker.starts[-1].HasField("prefill"):
        whole(worker, spec)
        return
    worker.say(spec, 0, transfer=TRANSFER)
    first = len(spec.token_ids) - spec.num_prompt_tokens + 1
    worker.say(spec, first, *range(100 + first, 100 + NUM_TOKENS), finish_reason=pb.FINISH_REASON_LENGTH)


class Dispatching:
    def __init__(
        self,
        limits: LadderLimits,
        fetch: FetchPolicy | None = None,
        placement: Placement = Placement.REMOTE,
        costs: CostBook | None = None,
    ) -> None:
        self.ended: list[GenerationRecord] = []
        self.receipts = ReceiptBook(self.ended.append)
        self.now_s = 0.0
        self.registry = Registry(GATEWAY, clock=lambda: self.now_s, costs=costs)
        self.num_started = 0
        self.links = LinkMatrix()
        self.prefix_index = PrefixIndex()
        self.dispatcher = WorkerDispatcher(
            self.registry,
            self.prefix_index,
            BLOCK_KEY,
            self.receipts,
            clock=lambda: self.now_s,
            placement=placement,
            limits=limits,
            fetch=fetch,
            links=self.links,
            on_start=self._count,
        )

    def _count(self) -> None:
        self.num_started += 1

    def request(self, **fields: Any) -> GenerationRequest:
        name = f"r{next(_ids)}"
        made = GenerationRequest(
            f"{name}.0", name, "m", PROMPT, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0), **fields
        )
        made.trace.mark(Instant.RECEIVED, 0.0)
        return made

    async def generate(self, request: GenerationRequest) -> list[int]:
        tokens: list[int] = []
        reasons: list[FinishReason | None] = []
        async for delta in self.dispatcher.generate(request):
            assert delta.first_index == len(tokens)
            tokens += [token.token_id for token in delta.tokens]
            reasons.append(delta.finish_reason)
        assert [reason for reason in reasons if reason] == [FinishReason.LENGTH]
        return tokens

    def assert_done(self) -> None:
        """Every generation ended once, and no link remembers one."""
        assert len(self.ended) == self.num_started
        assert not self.dispatcher.num_running
        assert [known.link.num_inflight for known in self.registry] == [0] * len(list(self.registry))


@asynccontextmanager
async def dispatching(
    prefill: tuple[Behaviour, ...] = (),
    decode: tuple[Behaviour, ...] = (),
    fetch: FetchPolicy | None = None,
    placement: Placement = Placement.REMOTE,
    costs: CostBook | None = None,
    status: dict[str, Any] | None = None,
    **limits: Any,
) -> AsyncIterator[tuple[Dispatching, list[ScriptedWorker], list[ScriptedWorker]]]:
    async with AsyncExitStack() as stack:
        pools = [
            [
                await stack.enter_async_context(run_worker(f"{role.value}-{n}", role, b))
                for n, b in enumerate(behaviours)
            ]
            for role, behaviours in ((Role.PREFILL, prefill), (Role.DECODE, decode))
        ]
        made = Dispatching(LadderLimits(**limits), fetch, placement, costs)
        stack.push_async_callback(made.registry.close)
        for worker in (*pools[0], *pools[1]):
            made.registry.heard(worker.status(**(status or {})))
        await eventually(lambda: len(made.registry.views()) == len(prefill) + len(decode))
        yield made, *pools


def hang_up(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    worker.hang_up()


def fail_handoff(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    worker.fail(spec, ErrorCode.HANDOFF_FAILED)


def known_link(made: Dispatching, worker_id: str) -> WorkerLink:
    known = made.registry.get(worker_id)
    assert known is not None
    return known.link
