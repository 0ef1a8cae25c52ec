"""The explorer: it finds nothing in the protocol as it is, and everything that was broken on purpose."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.kv_mutations import MUTATIONS, Mutation

from baton.kvtransfer.explorer.__main__ import main, report
from baton.kvtransfer.explorer.configuration import Configuration, Fault, Scenario
from baton.kvtransfer.explorer.search import explore


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_in_the_protocol_is_caught(mutation: Mutation) -> None:
    found = explore(mutation.configuration, mutation.types, strip=False)
    assert found.violation is not None
    assert found.violation.invariant is mutation.breaks, "\n".join((str(found.violation), *found.trace))
    assert found.trace[0] == "gateway opens handoff 1"


SOUND = [
    *{mutation.configuration: None for mutation in MUTATIONS},
    *(Configuration(scenario, num_blocks=1, pool_blocks=1, max_faults=1) for scenario in Scenario),
]


@pytest.mark.parametrize("configuration", SOUND, ids=str)
def test_the_protocol_as_it_is_breaks_no_invariant(configuration: Configuration) -> None:
    found = explore(configuration)
    assert found.violation is None, "\n".join((str(found.violation), *found.trace))
    assert found.num_states > 20


def test_every_kind_of_fault_leads_somewhere() -> None:
    configuration = Configuration(Scenario.REQUESTS, num_handoffs=1, num_blocks=1, pool_blocks=1, max_faults=1)
    without = explore(dataclasses.replace(configuration, faults=frozenset())).num_transitions
    for fault in Fault:
        found = explore(dataclasses.replace(configuration, faults=frozenset({fault})))
        assert found.num_transitions > without, fault


def test_the_command_line_prints_the_configuration_the_bound_and_what_was_found(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["--faults", "0", "--blocks", "1", "--handoffs", "1"]) == 0
    out = capfd.readouterr().out
    assert "requests: 2 peers and a gateway, 1 handoffs of 1 blocks, a pool of 1, at most 0 faults" in out
    assert "no violation" in out
    assert "0 violations, bound: 0 faults a run" in out


def test_a_violation_is_printed_with_its_trace() -> None:
    mutation = MUTATIONS[0]
    found = explore(mutation.configuration, mutation.types, strip=False)
    lines = report(mutation.configuration, found, 1.0).splitlines()
    assert "VIOLATION of: nothing is written into memory" in lines[2]
    assert lines[3].split(maxsplit=1) == ["1", "gateway opens handoff 1"]
    assert "frame of an older generation arrives: blocks 0" in lines[-1]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--blocks", "0"])
    assert exit_info.value.code == 2
