"""What the gateway learns from requests that are over: what workers cost, and whether handing over paid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import orjson

from baton.services.core.cost_learning import CostBook, Profile
from baton.services.core.cost_model import DecodeCost
from baton.services.core.errors import ConfigurationError
from baton.services.core.lifecycle import Instant
from baton.services.core.links import LinkMatrix
from baton.services.core.regret import Comparison, RegretBook
from baton.services.core.router import Candidate, WorkerView
from baton.services.core.scheduler.output_length import OutputLengthEstimator
from baton.services.core.threshold import handover_threshold
from baton.services.gateway.layouts import block_bytes
from baton.services.gateway.receipts import GenerationRecord
from baton.services.gateway.registry import Registry

PROFILE_FORMAT = "baton-profile-1"
_MOST_WORKERS = 16  # the least loaded ones, for the threshold
_WENT_WELL = ("stop", "length", "tool_calls")


class Experience:
    """``learn`` from every record that has ended. Lives on the gateway's event loop."""

    def __init__(
        self, costs: CostBook, clock: Callable[[], float], output_lengths: OutputLengthEstimator | None = None
    ) -> None:
        self._output_lengths = output_lengths or OutputLengthEstimator()
        self._costs = costs
        self._clock = clock
        self.regrets = RegretBook()

    def learn(self, record: GenerationRecord) -> Comparison | None:
        """A request that was tried again, or went wrong, says nothing about what it would have cost."""
        if len(record.attempts) != 1 or record.outcome not in _WENT_WELL:
            return None
        decision = record.attempts[0].decision
        chosen, trace, now = decision.chosen, record.trace, self._clock()
        prefiller = chosen.prefill or chosen.decode
        prefill_ms = trace.between_ms(Instant.PREFILL_START, Instant.PREFILL_END)
        if prefill_ms is not None and record.computed_tokens:
            pool = prefiller.role.value
            prefill_s = prefill_ms / 1e3
            prefill_s /= chosen.slowness  # what the streams beside it took is priced by how many there are
            self._costs.on_prefill(prefiller.incarnation, pool, record.computed_tokens, prefill_s, now)
        self._output_lengths.observe(record.completion_tokens)
        self._learn_steps(record, chosen, now)
        ttft_ms = trace.between_ms(Instant.ROUTED, Instant.FIRST_TOKEN)
        if ttft_ms is None:
            return None
        record.comparison = self.regrets.on_first_token(record.prompt_tokens, decision, ttft_ms / 1e3)
        return record.comparison

    def threshold_tokens(self, registry: Registry, links: LinkMatrix) -> int | None:
        """From which length on a prompt is worth handing over now; None: at no length."""
        return self._threshold_tokens(registry, registry.views_with_latest_costs(), links)

    def _threshold_tokens(self, registry: Registry, views: Sequence[WorkerView], links: LinkMatrix) -> int | None:
        compatibility = registry.compatibility()
        if compatibility is None:
            return None
        layout = compatibility.layout
        few = sorted(views, key=lambda view: (view.queued_tokens, view.running, view.worker_id))[:_MOST_WORKERS]
        return handover_threshold(
            few, links, self._clock(), block_size=layout.block_size or 16, block_bytes=block_bytes(layout)
        )

    def _learn_steps(self, record: GenerationRecord, chosen: Candidate, now: float) -> None:
        """A handoff lies between the first two tokens of an answer, and says nothing about steps."""
        decode, num_steps, begun_s = chosen.decode, record.completion_tokens - 1, record.trace.at(Instant.FIRST_TOKEN)
        pool = decode.role.value
        if chosen.prefill is not None and begun_s is not None and record.second_token_s is not None:
            self._costs.on_handoff(decode.incarnation, pool, record.second_token_s - begun_s, now)
            num_steps, begun_s = num_steps - 1, record.second_token_s
        ended_s = record.trace.at(Instant.ENDED)
        if num_steps > 0 and begun_s is not None and ended_s is not None:
            self._costs.on_decode(decode.incarnation, pool, decode.running + 1, (ended_s - begun_s) / num_steps, now)

    def describe(self, registry: Registry, links: LinkMatrix, placement: str) -> dict[str, object]:
        """``GET /v1/decisions``: from which length on prompts are worth handing over now, what workers cost, and what came of
        the decisions so far."""
        alive = [known.link.incarnation for known in registry]
        self._costs.forget_all_but(alive)
        views = registry.views_with_latest_costs()
        return {
            "placement": placement,
            "threshold_tokens": self._threshold_tokens(registry, views, links),
            "workers": [_describe(view) for view in sorted(views, key=lambda view: view.worker_id)],
            "data": self.regrets.table(),
        }


def _describe(view: WorkerView) -> dict[str, object]:
    cost = view.cost
    return {
        "id": view.worker_id,
        "role": view.role.value,
        "prefill_ms": {str(tokens): round(seconds * 1e3, 3) for tokens, seconds in cost.curve},
        "prefill_ms_per_token": round(cost.prefill_s_per_token * 1e3, 6),
        "decode_step_ms": round(cost.decode_step_s * 1e3, 3),
        "handoff_gap_ms": None if cost.gap_s is None else round(cost.gap_s * 1e3, 3),
        "decode_ms_per_sequence": None if cost.decode is None else round(cost.decode.per_sequence_s * 1e3, 6),
    }


def read_profiles(path: Path) -> dict[str, Profile]:
    """By pool, from a file that ``baton profile`` wrote. Raises ConfigurationError naming what is wrong with it."""
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigurationError(f"profile {path} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format") != PROFILE_FORMAT:
        raise ConfigurationError(f"{path} is not a profile of this version of baton (format {PROFILE_FORMAT})")
    try:
        return {str(pool): _profile(part) for pool, part in content["pools"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"profile {path} lacks or spoils a figure: {error!r}") from None


def _profile(part: Mapping[str, object]) -> Profile:
    curve: list[tuple[int, float]] = []
    prefill = part.get("prefill") or []
    if not isinstance(prefill, list):
        raise TypeError("prefill is not a list")
    for tokens, seconds in prefill:
        tokens, seconds = int(tokens), float(seconds)
        if tokens <= 0 or not 0 < seconds < 1e6 or (curve and (tokens <= curve[-1][0] or seconds < curve[-1][1])):
            raise ValueError(f"prefill point {tokens}, {seconds}")
        curve.append((tokens, seconds))
    decode = part.get("decode")
    if decode is None:
        return Profile(tuple(curve))
    if not isinstance(decode, dict):
        raise TypeError("decode is not an object")
    cost = DecodeCost(*(float(decode[name]) for name in ("base_s", "per_sequence_s", "per_context_token_s")))
    if not all(0 <= value < 1e3 for value in (cost.base_s, cost.per_sequence_s, cost.per_context_token_s)):
        raise ValueError(f"decode {cost}")
    return Profile(tuple(curve), cost)
