"""What the router decides about and what it answers with: workers as it sees them, requests, ways to run them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from baton.kvtransfer.versions import WIRE_VERSIONS, VersionRange, common_version
from baton.services.core.cost_model import WorkerCost
from baton.services.core.fetch import FetchPlan, FetchPolicy


class Role(StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


class Mode(StrEnum):
    """How a request is run."""

    REMOTE = "remote"  # prefill worker, then decode worker
    LOCAL = "local"  # the decode worker prefills itself
    COLOCATED = "colocated"  # one worker does both: it is its role, or a prefill worker answers a short request whole


class Placement(StrEnum):
    """Who prefills, where both could."""

    REMOTE = "remote"  # the prefill pool
    LOCAL = "local"  # the decode worker
    AUTO = "auto"  # whichever is cheaper


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the router sees it: its last report, with the gateway's own work in flight already counted in."""

    worker_id: str
    incarnation: str
    role: Role
    address: str
    compatibility: str  # equal strings: the same blocks
    host_id: str = ""
    queued_tokens: int = 0  # prompt tokens waiting or being computed
    running: int = 0  # requests; of a prefill worker those that it answers itself
    max_num_seqs: int = 256
    available_blocks: int = 1 << 30  # free or evictable
    max_num_batched_tokens: int = 2048
    cost: WorkerCost = field(default_factory=WorkerCost)
    tightest_tpot_s: float | None = None  # the strictest target of the streams that run there; None: none has one
    wire_versions: VersionRange = WIRE_VERSIONS  # of the transfer protocol
    answers_whole: bool = False  # of a prefill worker: it can answer a request itself
    gets_handoffs: bool = True  # of a decode worker: others hand over to it now and then

    def exchanges_blocks_with(self, other: WorkerView) -> bool:
        """They have the same blocks, and a version of the wire in common: a newer release and the one before it do."""
        is_spoken = common_version(self.wire_versions, other.wire_versions) is not None
        return is_spoken and self.compatibility == other.compatibility


class Answer(NamedTuple):
    """What is expected of a request's answer, in tokens that are to come."""

    num_tokens: int  # probably
    max_tokens: int  # at most


@dataclass(slots=True)  # not frozen: that would cost a microsecond a request
class RoutedRequest:
    """What the router needs to know about a request. ``cached_blocks``: worker id -> leading blocks it holds."""

    request_id: str
    num_tokens: int
    block_size: int
    block_bytes: int
    cached_blocks: Mapping[str, int]
    excluded: Collection[str] = ()  # incarnations that already failed this request
    excluded_pairs: Collection[tuple[str, str]] = ()  # prefill and decode incarnations that failed it together
    preferred: Collection[str] = ()  # incarnations that hold blocks of it: before the price counts
    fetch: FetchPolicy | None = None  # None: blocks that others hold are not fetched
    ttft_target_s: float | None = None  # what was promised to the client; None: nothing
    tpot_target_s: float | None = None
    answer: Answer | None = None  # None: what comes after the first token is not compared, and nobody answers it whole

    def num_uncached_tokens(self, worker_id: str, fetch: FetchPlan | None = None) -> int:
        num_blocks = self.cached_blocks.get(worker_id, 0) if fetch is None else fetch.num_blocks
        return max(1, self.num_tokens - num_blocks * self.block_size)


class Candidate(NamedTuple):
    """One way to run the request and what it costs, in seconds."""

    mode: Mode
    decode: WorkerView
    prefill: WorkerView | None
    queue_s: float
    prefill_s: float
    transfer_s: float
    decode_wait_s: float
    interference_s: float = 0.0  # time that it costs after the first token: itself, and the streams beside it
    fetch: FetchPlan | None = None  # what the worker that prefills gets from a third one first
    num_misses: int = 0  # targets that are predicted to be missed: its own, and those of the streams beside it
    curiosity_s: float = 0.0  # what is given for learning the worker's speed
    slowness: float = 1.0  # how many times its own time the prompt is expected to take, beside the worker's streams

    @property
    def ttft_s(self) -> float:
        """Predicted time to first token."""
        fetch_s = 0.0 if self.fetch is None else self.fetch.fetch_s
        return self.queue_s + fetch_s + self.prefill_s + self.transfer_s + self.decode_wait_s

    @property
    def price_s(self) -> float:
        return self.ttft_s + self.interference_s - self.curiosity_s

    @property
    def workers(self) -> tuple[WorkerView, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


class RoutingDecision(NamedTuple):
    """The choice, the best way not chosen, and a sentence on why.

    ``other_way`` is the best of those that would have had another worker prefill: local beside a remote choice, and the other
    way round. It is what tells whether handing over pays.
    """

    chosen: Candidate
    runner_up: Candidate | None
    reason: str
    other_way: Candidate | None = None
