"""Which pairs are probed ahead of need: all of a small cluster; of a large one a few of each worker, so that their number grows
with the workers and not with their square. Pure.

The others are usable at the default price until a transfer measures them.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Sequence

from baton.services.core.candidates import WorkerView
from baton.services.core.links import PairKey

# A cluster with at most so many pairs is probed whole.
ALL_PAIRS = 256
# Of a larger one, for each prefill worker: so many on its own host, which the router likes best, and so many elsewhere.
_NEAR, _FAR = 4, 2
_FAR_OF_DECODE = 2  # for each decode worker: none is left out


def pairs_to_probe(prefill: Sequence[WorkerView], decode: Sequence[WorkerView]) -> list[PairKey]:
    """Those that are chosen for a worker hardly change when others come and go."""
    if not prefill or not decode:
        return []
    if len(prefill) * len(decode) <= ALL_PAIRS:
        return [PairKey(one.incarnation, other.incarnation) for one in prefill for other in decode]
    on_host: dict[str, list[WorkerView]] = {}
    for other in decode:
        if other.host_id:
            on_host.setdefault(other.host_id, []).append(other)
    rings = [_Ring(decode), _Ring(prefill)]
    pairs: dict[PairKey, None] = {}  # a set in one order everywhere
    for one in prefill:
        for other in (*on_host.get(one.host_id, ())[:_NEAR], *rings[0].after(one, _FAR)):
            pairs[PairKey(one.incarnation, other.incarnation)] = None
    for other in decode:
        for one in rings[1].after(other, _FAR_OF_DECODE):
            pairs[PairKey(one.incarnation, other.incarnation)] = None
    return list(pairs)


class _Ring:
    """Workers in an order that is as good as random and that a newcomer leaves as it is."""

    def __init__(self, workers: Sequence[WorkerView]) -> None:
        placed = sorted(((_place(worker), worker.worker_id, worker) for worker in workers), key=lambda item: item[:2])
        self._places = [place for place, _, _ in placed]
        self._workers = [worker for _, _, worker in placed]

    def after(self, worker: WorkerView, count: int) -> list[WorkerView]:
        """The next ones from where the worker would stand."""
        at = bisect_left(self._places, _place(worker))
        num_workers = len(self._workers)
        return [self._workers[(at + step) % num_workers] for step in range(min(count, num_workers))]


def _place(worker: WorkerView) -> int:
    return zlib.crc32(worker.incarnation.encode())
