"""Limits that contradict themselves."""

from __future__ import annotations

import pytest
from helpers.scheduling import make_limits

from baton.services.core.errors import ConfigurationError


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, r"max_num_batched_tokens \(7\) is below max_num_seqs \(8\)"),
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"short_prompt_share": 1.0}, "short_prompt_share is 1.0"),
        ({"max_interleaved_prefill_tokens": 0}, "max_interleaved_prefill_tokens is 0"),
    ],
)
def test_limits_that_no_step_could_keep_are_refused_by_name(changes: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        make_limits(**changes)
