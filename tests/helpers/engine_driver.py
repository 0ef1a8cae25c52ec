"""Runs an engine without the real schedulers: hands out blocks in order and computes every request to its end."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from baton.services.core.request import Request, SampledToken, SamplingParams, TokenLogprobs
from baton.services.core.scheduler.base import ScheduledRequest
from baton.services.engine.engine import Engine

_ids = itertools.count()


def make_request(
    token_ids: Sequence[int], *, max_tokens: int = 24, num_prompt_tokens: int | None = None, **sampling: object
) -> Request:
    """A request, greedy unless ``sampling`` says otherwise."""
    params = replace(SamplingParams(max_tokens=max_tokens, temperature=0.0), **sampling)  # type: ignore[arg-type]
    return Request(
        request_id=f"r{next(_ids)}",
        attempt=1,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        sampling=params,
    )


class Driver:
    """Blocks are handed out in a scattered order, so that a table that is not followed is noticed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        num_blocks = engine.cache.num_blocks
        self.free_blocks = [block * 7919 % num_blocks for block in range(num_blocks)]
        assert len(set(self.free_blocks)) == num_blocks, "7919 must not divide the number of blocks"
        self.sampled: dict[str, list[SampledToken]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}

    def allocate(self, request: Request, num_tokens: int) -> None:
        while len(request.block_table) * self.engine.cache.block_size < num_tokens:
            request.block_table.append(self.free_blocks.pop())

    def step(self, shares: Iterable[tuple[Request, int]]) -> None:
        batch = [ScheduledRequest(request, num_tokens) for request, num_tokens in shares]
        for item in batch:
            self.allocate(item.request, item.request.num_computed_tokens + item.num_tokens)
        result = self.engine.step(batch)
        for item in batch:
            request = item.request
            request.num_computed_tokens += item.num_tokens
            self.prompt_logprobs.setdefault(request.request_id, []).extend(
                result.prompt_logprobs.get(request.request_id, [])
            )
            token = result.sampled.get(request.request_id)
            assert (token is not None) == (request.num_computed_tokens == request.num_tokens)
            if token is not None:
                request.token_ids.append(token.token_id)
                self.sampled.setdefault(request.request_id, []).append(token)

    def run(self, requests: Sequence[Request], chunk_size: int = 1 << 20) -> None:
        """Compute all of them together, at most ``chunk_size`` tokens of each in a step, until each has its max_tokens."""
        while running := [r for r in requests if r.num_output_tokens < r.sampling.max_tokens]:
            self.step((request, min(chunk_size, request.num_uncomputed_tokens)) for request in running)

    def output(self, request: Request) -> list[int]:
        return request.token_ids[request.num_prompt_tokens :]
