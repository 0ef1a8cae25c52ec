"""Sums over what workers said last, kept up to date report by report: a thousand workers report a thousand times a second."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from baton.api.common.v1 import common_pb2 as pb

# Shares are added and taken away in whole parts, so that no rounding is left of them.
_PARTS = 1_000_000


class _Said(NamedTuple):
    """Of one worker."""

    waiting_tokens: int = 0
    max_model_len: int = 0
    num_streams: int = 0  # of a decode worker, and those that a prefill worker answers itself
    prompt_parts: int = 0  # of their steps together


class Reported:
    """Of the workers that can be reached."""

    def __init__(self) -> None:
        self.waiting_tokens = 0
        """Prompt tokens that wait on workers, without those of the lowest class."""
        self._said: dict[str, _Said] = {}  # by worker id
        self._lengths: Counter[int] = Counter()  # workers by the longest context that they serve
        self._num_streams = 0
        self._prompt_parts = 0

    def put(self, worker_id: str, status: pb.WorkerStatus) -> None:
        """Its last report."""
        num_streams = status.running if status.role == pb.WORKER_ROLE_DECODE else status.answering
        self._replace(
            worker_id,
            _Said(
                status.queued_tokens - status.batch_queued_tokens,
                status.max_model_len,
                num_streams,
                num_streams * round(_PARTS * min(max(status.prompt_share, 0.0), 1.0)),
            ),
        )

    def drop(self, worker_id: str) -> None:
        """It cannot be reached any more."""
        self._replace(worker_id, None)

    @property
    def max_model_len(self) -> int | None:
        """The context length that every one can serve; None while nobody has told."""
        return min(self._lengths, default=None)

    @property
    def prompt_share(self) -> float:
        """Of the steps of streams, what the prompts take that are computed beside them on their workers: 0 to 1."""
        return self._prompt_parts / (self._num_streams * _PARTS) if self._num_streams else 0.0

    def _replace(self, worker_id: str, said: _Said | None) -> None:
        before = self._said.pop(worker_id, _NOTHING)
        if said is not None:
            self._said[worker_id] = said
        after = said or _NOTHING
        self.waiting_tokens += after.waiting_tokens - before.waiting_tokens
        self._num_streams += after.num_streams - before.num_streams
        self._prompt_parts += after.prompt_parts - before.prompt_parts
        if before.max_model_len:
            self._lengths[before.max_model_len] -= 1
            if not self._lengths[before.max_model_len]:
                del self._lengths[before.max_model_len]
        if after.max_model_len:
            self._lengths[after.max_model_len] += 1


_NOTHING = _Said()
