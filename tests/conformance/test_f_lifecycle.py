"""F. Starting, stopping and losing processes. Most of it needs many processes and is shown elsewhere: see the catalogue."""

from __future__ import annotations

import signal
from dataclasses import replace

from conformance.conftest import Owned
from helpers.api_client import COMPLETIONS, Api
from helpers.gateway_replica import Replica, run_replica

STORY = "One day the fox went out to look for the old key of the house"


def test_b087_with_no_grace_what_runs_is_cut_short(owned: Owned, api: Api) -> None:
    """One gateway of the installation is asked to end: its streams end with an error, and it with status 0."""
    with run_replica(owned.serving, "--drain-timeout-s", "0") as gateway:
        here = replace(api, url=gateway.url)
        gateway.wait_until_ready()
        with owned.slow_decoding(), here.open(COMPLETIONS, prompt=STORY, max_tokens=900, ignore_eos=True) as events:
            next(events)
            gateway.process.send_signal(signal.SIGTERM)
            *_, last = events
            assert last["error"]["code"] == "draining"
        assert gateway.process.wait(30.0) == 0
    owned.serving.assert_clean(60.0)
    api.still_serves()


def test_b088_ready_is_false_until_something_can_serve(replica: Replica, api: Api) -> None:
    assert replica.answers[-1] == (200, "ready")
    assert {status for status, _ in replica.answers[:-1]} <= {503}
    here = replace(api, url=replica.url)
    here.still_serves()
