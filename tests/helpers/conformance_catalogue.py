"""Behaviours of the conformance suite that are not shown there: by which test they are, or that nothing shows them yet."""

from __future__ import annotations

from dataclasses import dataclass

# letter -> its last number
LETTERS = {"A": 35, "B": 52, "C": 67, "D": 78, "E": 86, "F": 95, "G": 102}


@dataclass(frozen=True)
class Elsewhere:
    """Tests with real processes or parts that show a behaviour: "file::name"; of a chaos scenario the name is its own."""

    says: str
    tests: tuple[str, ...]


SHORT_CHAOS = "tests/chaos/scenarios/short/short.yaml"
ELSEWHERE: dict[int, Elsewhere] = {
    66: Elsewhere(
        "a comment keeps a stream open that waits for long",
        (
            "tests/unit/gateway/test_streams.py::test_a_waiting_stream_gets_comments_and_then_its_answer",
            "tests/unit/gateway/test_streams.py::test_no_comments_while_tokens_flow",
        ),
    ),
    89: Elsewhere(
        "a prefill worker that is killed changes no answer",
        (
            f"{SHORT_CHAOS}::short-prefill-killed",
            "tests/integration/test_resume.py::test_without_prefill_workers_decode_workers_prefill_and_ready_says_so",
        ),
    ),
    90: Elsewhere(
        "nor does a decode worker",
        (
            f"{SHORT_CHAOS}::short-decode-killed",
            "tests/integration/test_resume.py::test_a_decode_worker_that_is_killed_under_streams_changes_no_token",
        ),
    ),
    91: Elsewhere(
        "stale, foreign and expired claims on blocks are refused",
        (
            "tests/unit/kvtransfer/test_agent.py::test_another_sender_than_the_announced_one_is_stale",
            "tests/unit/kvtransfer/test_agent.py::test_an_older_attempt_is_stale_at_once",
            "tests/unit/kvtransfer/test_agent.py::test_a_message_for_another_incarnation_is_stale",
            "tests/unit/kvtransfer/test_faults.py::test_an_expired_lease_frees_the_slots_and_everything_later_is_refused",
            f"{SHORT_CHAOS}::short-link-cut-and-frames-doubled",
        ),
    ),
    92: Elsewhere(
        "a lease that ends under a transfer ends the transfer, and the request goes on elsewhere",
        (
            "tests/unit/kvtransfer/test_faults.py::test_a_sender_that_cannot_renew_gives_up_when_its_lease_ends",
            "tests/unit/gateway/test_dispatch_failures.py::test_a_failed_handoff_goes_elsewhere_and_the_gap_is_closed",
        ),
    ),
    93: Elsewhere(
        "handed over or not, the tokens are the same",
        (
            "tests/integration/test_equality.py::test_tokens_equal_transformers",
            "tests/integration/test_serve.py::test_seeded_sampling_is_the_same_in_both_topologies",
        ),
    ),
    94: Elsewhere(
        "a client that leaves in any phase frees all blocks",
        (
            "tests/integration/test_failures.py::test_closing_the_generator_in_any_phase_frees_everything",
            f"{SHORT_CHAOS}::short-hang-ups",
        ),
    ),
    95: Elsewhere(
        "workers drop what a gateway asked for that is gone",
        ("tests/integration/test_resume.py::test_a_gateway_that_is_killed_leaves_nothing_on_the_workers",),
    ),
}

NOT_BUILT: dict[int, str] = {}
