"""Prices under which a prefill worker answers every request whole, with ``Placement.AUTO``."""

from __future__ import annotations

import json
from pathlib import Path

from baton.services.core.cost_learning import CostBook, Profile
from baton.services.core.cost_model import DecodeCost
from baton.services.gateway.experience import PROFILE_FORMAT
from baton.services.gateway.generation import SloTarget

# Decode workers neither compute a prompt in time nor a token, so a handoff misses what was promised as well.
CURVES = {"prefill": ((1, 1e-3), (8192, 2e-3)), "decode": ((1, 5e3), (8192, 6e3))}
STEPS_S = {"prefill": 1e-6, "decode": 5.0}
PATIENT = SloTarget("standard", ttft_ms=1e6, tpot_ms=1e3)


def whole_costs() -> CostBook:
    """What a gateway knows that has such a profile."""
    return CostBook({pool: Profile(curve, DecodeCost(STEPS_S[pool], 0.0)) for pool, curve in CURVES.items()})


def write_profile(path: Path) -> Path:
    """The same as a file for ``--profile``."""
    pools = {
        pool: {
            "prefill": [list(point) for point in curve],
            "decode": {"base_s": STEPS_S[pool], "per_sequence_s": 0.0, "per_context_token_s": 0.0},
        }
        for pool, curve in CURVES.items()
    }
    path.write_text(json.dumps({"format": PROFILE_FORMAT, "pools": pools}))
    return path
