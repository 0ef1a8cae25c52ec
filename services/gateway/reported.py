"""Sums over what workers said last, kept up to date report by report: a thousand workers report a thousand times a second."""

from __future__ import annotations

from collections import Counter

from baton.api.common.v1 import common_pb2 as pb


class Reported:
    """Of the workers that can be reached."""

    def __init__(self) -> None:
        self.waiting_tokens = 0
        """Prompt tokens that wait on workers, without those of the lowest class."""
        self._of_workers: dict[str, tuple[int, int]] = {}  # by worker id: waiting tokens, longest context
        self._lengths: Counter[int] = Counter()  # workers by the longest context that they serve

    def put(self, worker_id: str, status: pb.WorkerStatus) -> None:
        """Its last report."""
        self.drop(worker_id)
        waiting, length = status.queued_tokens - status.batch_queued_tokens, status.max_model_len
        self._of_workers[worker_id] = waiting, length
        self.waiting_tokens += waiting
        if length:
            self._lengths[length] += 1

    def drop(self, worker_id: str) -> None:
        """It cannot be reached any more."""
        waiting, length = self._of_workers.pop(worker_id, (0, 0))
        self.waiting_tokens -= waiting
        if length:
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]

    @property
    def max_model_len(self) -> int | None:
        """The context length that every one can serve; None while nobody has told."""
        return min(self._lengths, default=None)
