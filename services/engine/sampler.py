"""Chooses the next token of each row.

A choice is a function of (logits, tokens so far, sampling parameters, seed, position) alone: no hidden state, so a
continuation on another worker draws the same, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from baton import kernels
from baton.services.core.request import Request, SampledToken
from baton.services.engine.logprobs import compute_logprobs
from baton.services.engine.penalties import LogitAdjuster, is_adjusted
from baton.services.engine.token_masks import MaskedRows


class Sampler:
    """Samples a batch. What it keeps between calls only saves time."""

    def __init__(self) -> None:
        self._adjuster = LogitAdjuster()
        self._requests: list[Request] = []  # whose parameters self._params holds
        self._params: kernels.SamplingTensors | None = None

    def sample(
        self, logits: torch.Tensor, requests: list[Request], masks: MaskedRows | None = None
    ) -> list[SampledToken]:
        """One token for each row of ``logits`` [len(requests), vocab_size]; ``requests[i]`` owns row i.

        ``masks`` come after penalties and biases and before temperature; logprobs know nothing of them.
        """
        token_ids = self._choose(logits, requests, masks)
        chosen = token_ids.tolist()
        reported = [i for i, request in enumerate(requests) if request.sampling.num_logprobs is not None]
        if not reported:
            return [SampledToken(token_id) for token_id in chosen]
        rows = torch.tensor(reported, device=logits.device)
        num_top = [requests[i].sampling.num_logprobs or 0 for i in reported]
        logprobs = dict(zip(reported, compute_logprobs(logits[rows], token_ids[rows], num_top), strict=True))
        return [SampledToken(token_id, logprobs.get(i)) for i, token_id in enumerate(chosen)]

    def _choose(self, logits: torch.Tensor, requests: list[Request], masks: MaskedRows | None) -> torch.Tensor:
        """[rows] int64. ``logits`` stay as they are: logprobs are of the unmodified distribution."""
        adjusted = [i for i, request in enumerate(requests) if is_adjusted(request)]
        original = logits
        if adjusted or masks is not None:
            logits = logits.to(torch.float32, copy=True)
        if adjusted:
            if len(adjusted) == len(requests):
                self._adjuster.apply(logits, requests)
            else:
                rows = torch.tensor(adjusted, device=logits.device)
                part = logits[rows]
                self._adjuster.apply(part, [requests[i] for i in adjusted])
                logits[rows] = part
        if masks is not None:
            masks.apply(logits, original)
        if all(request.sampling.is_greedy for request in requests):
            return logits.argmax(dim=-1)  # the first of equals, as the kernel does
        return kernels.sample(logits.float(), self._tensors(requests, logits.device))

    def _tensors(self, requests: list[Request], device: torch.device) -> kernels.SamplingTensors:
        """Parameters by row. A decode batch is mostly the last step's: then only the positions are new."""
        positions = torch.tensor([request.num_tokens for request in requests], dtype=torch.int64, device=device)
        if self._params is None or requests != self._requests:
            self._requests = list(requests)
            self._params = _build_tensors(requests, positions)
        else:
            self._params = replace(self._params, position=positions)
        return self._params


def _build_tensors(requests: Sequence[Request], positions: torch.Tensor) -> kernels.SamplingTensors:
    device = positions.device
    params = [request.sampling for request in requests]

    def floats(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return kernels.SamplingTensors(
        temperature=floats([p.temperature for p in params]),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
        top_p=floats([p.top_p for p in params]),
        min_p=floats([p.min_p for p in params]),
        seed=torch.tensor([_as_signed(p.seed) for p in params], dtype=torch.int64, device=device),
        position=positions,
    )


def _as_signed(seed: int) -> int:
    """The bits of an unsigned 64-bit number, read as a signed one."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
