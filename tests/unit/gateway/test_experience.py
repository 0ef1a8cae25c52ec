"""What the gateway learns from requests that are over, and the profile that it starts with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.services.core.cost_learning import CostBook
from baton.services.core.cost_model import DecodeCost
from baton.services.core.errors import ConfigurationError
from baton.services.core.ladder_steps import Attempt
from baton.services.core.lifecycle import Instant, Trace
from baton.services.core.router import Role, RoutedRequest, WorkerView, route
from baton.services.core.scheduler.output_length import OutputLengthEstimator
from baton.services.gateway.experience import PROFILE_FORMAT, Experience, read_profiles
from baton.services.gateway.generation import SloTarget
from baton.services.gateway.receipts import GenerationRecord, render_receipt

WORKERS = [
    WorkerView("p0", "inc-p0", Role.PREFILL, "h:1", "same", "host"),
    WorkerView("d0", "inc-d0", Role.DECODE, "h:2", "same", "host"),
]


def ended(outcome: str = "stop", num_attempts: int = 1) -> GenerationRecord:
    decision = route(RoutedRequest("r", 640, 16, 65536, {}), WORKERS)
    trace = Trace()
    for instant, at_s in (
        (Instant.RECEIVED, 0.0),
        (Instant.ROUTED, 0.1),
        (Instant.PREFILL_START, 0.2),
        (Instant.PREFILL_END, 0.7),
        (Instant.FIRST_TOKEN, 0.8),
        (Instant.ENDED, 1.8),
    ):
        trace.mark(instant, at_s)
    record = GenerationRecord("r.0", 640, trace, SloTarget(), computed_tokens=600, completion_tokens=11)
    record.attempts = [Attempt(number, decision) for number in range(1, num_attempts + 1)]
    record.outcome = outcome
    return record


def test_a_request_that_went_well_teaches_what_it_cost_and_is_compared() -> None:
    costs = CostBook()
    experience = Experience(costs, lambda: 0.0)
    record = ended()
    comparison = experience.learn(record)
    assert comparison is record.comparison
    assert comparison is not None
    assert comparison.regret_s is not None
    learned = costs.cost("inc-p0", "prefill", prefill_s_per_token=0.0, decode_step_s=0.0, now=0.0)
    assert learned.prefill_s(600) == pytest.approx(0.5)
    assert costs.num_observed("inc-p0", 0.0) == 1
    decision = render_receipt("r", "m", [record])["decision"]
    assert isinstance(decision, dict)
    assert decision["other_way"]["mode"] == "local"
    assert decision["regret_ms"] == pytest.approx(comparison.regret_s * 1e3, abs=1e-3)


@pytest.mark.parametrize(("outcome", "num_attempts"), [("error", 1), ("abort", 1), ("stop", 2)])
def test_a_request_that_was_disturbed_teaches_nothing(outcome: str, num_attempts: int) -> None:
    costs = CostBook()
    assert Experience(costs, lambda: 0.0).learn(ended(outcome, num_attempts)) is None
    assert costs.num_observed("inc-p0", 0.0) == 0


def test_a_handoff_between_the_first_two_tokens_says_nothing_about_steps() -> None:
    costs = CostBook()
    record = ended()
    record.second_token_s = 1.0
    Experience(costs, lambda: 0.0).learn(record)
    learned = costs.cost("inc-d0", "decode", prefill_s_per_token=0.0, decode_step_s=0.0, now=0.0)
    assert learned.gap_s == pytest.approx(0.2)
    record = ended()
    record.second_token_s, record.completion_tokens = 1.0, 2
    Experience(costs := CostBook(), lambda: 0.0).learn(record)
    assert not costs._workers["inc-d0"].decode, "one that ends with its second token has no step to learn from"


def test_the_lengths_of_answers_are_learned_for_those_who_expect_them() -> None:
    lengths = OutputLengthEstimator()
    experience = Experience(CostBook(), lambda: 0.0, lengths)
    before = lengths.expected(1000)
    for _ in range(50):
        experience.learn(ended())
    assert lengths.expected(1000) < 16 < before


def profile(**changes: object) -> dict[str, object]:
    decode = {"base_s": 0.01, "per_sequence_s": 0.001, "per_context_token_s": 0.0}
    return {
        "format": PROFILE_FORMAT,
        "pools": {"prefill": {"prefill": [[16, 0.1], [64, 0.2]], "decode": decode}},
    } | changes


def test_a_profile_is_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile()))
    (found,) = read_profiles(path).values()
    assert found.prefill == ((16, 0.1), (64, 0.2))
    assert found.decode == DecodeCost(0.01, 0.001, 0.0)


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        json.dumps(profile(format="another")),
        json.dumps(profile(pools=3)),
        json.dumps(profile(pools={"prefill": 3})),
        json.dumps(profile(pools={"prefill": {"prefill": [[16, 0.2], [8, 0.3]]}})),
        json.dumps(profile(pools={"prefill": {"prefill": [[16, -1]]}})),
        json.dumps(profile(pools={"prefill": {"prefill": [[16]]}})),
        json.dumps(profile(pools={"prefill": {"decode": {"base_s": 1}}})),
        json.dumps(
            profile(pools={"prefill": {"decode": {"base_s": -1, "per_sequence_s": 0, "per_context_token_s": 0}}})
        ),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"odd\.json"):
        read_profiles(path)


def test_a_profile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_profiles(tmp_path / "nothing.json")
