"""Logprobs as they are reported: natural log of the unmodified distribution, before temperature, penalties and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.services.core.request import TokenLogprobs

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say


def compute_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Logprobs of ``token_ids`` [rows] and of the ``num_top[i]`` most likely tokens, from ``logits`` [rows, vocab_size]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1).nan_to_num_(nan=MIN_LOGPROB, neginf=MIN_LOGPROB)
    logprobs.clamp_(min=MIN_LOGPROB)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist()
    most = min(max(num_top), logprobs.shape[1])
    if most == 0:
        return [TokenLogprobs(logprob) for logprob in chosen]
    values, ids = logprobs.topk(most, dim=-1)
    return [
        TokenLogprobs(logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for logprob, row_ids, row_values, count in zip(chosen, ids.tolist(), values.tolist(), num_top, strict=True)
    ]
