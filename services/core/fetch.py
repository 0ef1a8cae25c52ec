"""Whether a worker fetches a prompt's leading blocks from one that holds them, or computes them.

Moving costs ``t0 + bytes / bandwidth``, computing ``tokens * time per token``. Who holds what is a guess from what workers
announced: a wrong one costs a question, so the worker is told how long to wait, and computes then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from baton.services.core.cost_model import LinkCost

FETCH_FAILED = "fetch_failed"
"""The reason of ``baton_fallbacks_total``: the blocks did not come, and were computed."""

# The question, the grant and the commit come one after the other, and no computing hides them. Until a fetch was measured.
ROUND_TRIPS_S = 4e-3
_MOST_ROUND_TRIPS_S = 50e-3  # one slow moment must not end fetching for good: nothing would be measured any more


class FetchMode(StrEnum):
    """When blocks that another worker holds are fetched."""

    AUTO = "auto"  # when that is predicted to be faster than computing them
    ALWAYS = "always"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """``min_patience_s``: waited at least, since no cost model knows a slow moment of a peer. ``round_trips_s``: what a fetch
    takes besides its bytes."""

    mode: FetchMode = FetchMode.AUTO
    min_patience_s: float = 2.0
    round_trips_s: float = ROUND_TRIPS_S

    def learned(self, plan: FetchPlan, took_s: float) -> FetchPolicy:
        """After a fetch that went as planned: a fifth of its surprise is believed."""
        surprise_s = took_s - plan.fetch_s
        round_trips_s = self.round_trips_s + 0.2 * surprise_s
        return replace(self, round_trips_s=min(max(round_trips_s, 1e-3), _MOST_ROUND_TRIPS_S))


class FetchPlan(NamedTuple):
    """Ask ``holder_id`` for the first ``num_blocks`` blocks of the prompt, of which ``num_new`` are lacking."""

    holder_id: str
    num_blocks: int
    num_new: int
    fetch_s: float  # predicted
    compute_s: float  # what computing them instead would take
    patience_s: float  # then compute: together that is at most what computing at once would have taken, and a little


def plan_fetch(
    policy: FetchPolicy,
    needer_id: str,
    links: Mapping[str, LinkCost],
    cached_blocks: Mapping[str, int],
    *,
    num_tokens: int,
    block_size: int,
    block_bytes: int,
    prefill_s_per_token: float,
) -> FetchPlan | None:
    """The fetch that saves the most time, or None where computing is as fast or nobody holds more.

    ``links``: from each worker that may be asked to the one that needs the blocks. ``cached_blocks``: leading blocks of the
    prompt by worker. A block that the prompt's last token fills is of no use: that token is computed in any case.
    """
    if policy.mode is FetchMode.OFF:
        return None
    num_useful = (num_tokens - 1) // block_size
    num_here = min(cached_blocks.get(needer_id, 0), num_useful)
    best: FetchPlan | None = None
    for holder_id in sorted(links):
        num_blocks = min(cached_blocks.get(holder_id, 0), num_useful)
        num_new = num_blocks - num_here
        if holder_id == needer_id or num_new <= 0:
            continue
        compute_s = num_new * block_size * prefill_s_per_token
        fetch_s = policy.round_trips_s + links[holder_id].transfer_s(num_new * block_bytes)
        if policy.mode is FetchMode.AUTO and fetch_s >= compute_s:
            continue
        if best is None or compute_s - fetch_s > best.compute_s - best.fetch_s:
            patience_s = policy.min_patience_s + compute_s
            best = FetchPlan(holder_id, num_blocks, num_new, fetch_s, compute_s, patience_s)
    return best
