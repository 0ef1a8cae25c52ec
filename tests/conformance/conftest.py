"""Which server the suite talks to: the one at --base-url, or a ``baton serve`` of its own, shared by the whole session."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from helpers.api_client import Api
from helpers.conformance_catalogue import LETTERS, NOT_BUILT
from helpers.conformance_model import write_model
from helpers.failpoints_client import failpoints
from helpers.gateway_replica import Replica, run_replica
from helpers.serving import Serving, serving

KEY, OTHER_KEY = "conformance-key-1", "conformance-key-2"
MODEL = "conformance"
# Enough to meet every limit in a moment.
MAX_MODEL_LEN = 1024
MAX_CONCURRENT_REQUESTS = 48
OPTIONS = (
    *("--served-model-name", MODEL, "--max-model-len", str(MAX_MODEL_LEN), "--dtype", "float32"),
    *("--kv-cache-memory", "32MiB", "--max-num-seqs", "16", "--api-key", KEY, "--api-key", OTHER_KEY),
    *("--max-concurrent-requests", str(MAX_CONCURRENT_REQUESTS), "--failpoints", "on"),
)
_NUMBER = re.compile(r"::test_b(\d{3})_")


@dataclass(frozen=True)
class Owned:
    """The server, where it is the suite's own: its processes may be looked at, slowed and killed."""

    serving: Serving
    other_key: str = OTHER_KEY
    max_concurrent_requests: int = MAX_CONCURRENT_REQUESTS

    def worker(self, worker_id: str) -> dict[str, Any]:
        """What /v1/workers says of it."""
        return next(worker for worker in self.serving.workers() if worker["id"] == worker_id)

    @contextmanager
    def failpoints(self, worker_id: str, rules: str) -> Iterator[None]:
        with failpoints(self.worker(worker_id)["address"], rules):
            yield

    def slow_decoding(self) -> AbstractContextManager[None]:
        """A token takes long enough that no stream of hundreds ends by itself."""
        return self.failpoints("decode-0", "decode.step_n=delay(50)")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--base-url", default=None, help="The server to test. Default: one is started.")
    group.addoption("--model", default=None, help="The model to ask for. Default: the first in /v1/models.")
    group.addoption("--api-key", default=None, help="Sent as a bearer token.")


@pytest.fixture(scope="session")
def own_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owned | None]:
    """None where --base-url names another server."""
    if request.config.getoption("base_url", default=None):
        yield None
        return
    folder = write_model(tmp_path_factory.mktemp("conformance") / MODEL)
    with serving("--model", str(folder), *OPTIONS) as running:
        running.key = OTHER_KEY
        yield Owned(running)


@pytest.fixture(scope="session")
def api(request: pytest.FixtureRequest, own_server: Owned | None) -> Iterator[Api]:
    """The server under test."""
    if own_server is not None:
        url, key, model = own_server.serving.url, KEY, MODEL
    else:
        url = request.config.getoption("base_url").rstrip("/").removesuffix("/v1")
        key, model = request.config.getoption("api_key", default=None), request.config.getoption("model", default=None)
    with httpx.Client(timeout=60.0, limits=httpx.Limits(max_connections=200)) as http:
        client = Api(url, model or "", key, http=http)
        models = client.get("/v1/models").json()["data"]
        client.model = client.model or str(models[0]["id"])
        listed = next((one for one in models if one["id"] == client.model), {})
        client.max_model_len = listed.get("max_model_len")
        yield client


@pytest.fixture(scope="session")
def replica(own_server: Owned | None) -> Iterator[Replica]:
    """A second gateway beside the first."""
    if own_server is None:
        pytest.skip("needs a server that the suite started itself")
    with run_replica(own_server.serving) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def owned(own_server: Owned | None) -> Owned:
    """For behaviours that only a server of our own can show."""
    if own_server is None:
        pytest.skip("needs a server that the suite started itself")
    return own_server


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Behaviours by letter: passed where all of a number's tests passed, skipped where none ran."""
    outcomes: dict[int, set[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            if match := _NUMBER.search(getattr(report, "nodeid", "")):
                outcomes.setdefault(int(match[1]), set()).add(outcome)
    if not outcomes:
        return
    terminalreporter.section("conformance: behaviours by letter")
    names = ("passed", "failed", "skipped", "elsewhere", "not built")
    terminalreporter.write_line(f"{'':4}" + "".join(f"{name:>11}" for name in names))
    first = 1
    for letter, last in LETTERS.items():
        numbers = range(first, last + 1)
        seen = [outcomes[number] for number in numbers if number in outcomes]
        failed = sum(bool(one & {"failed", "error"}) for one in seen)
        skipped = sum(one == {"skipped"} for one in seen)
        not_built = sum(number in NOT_BUILT for number in numbers)
        figures = (len(seen) - failed - skipped, failed, skipped, len(numbers) - len(seen) - not_built, not_built)
        terminalreporter.write_line(f"{letter:4}" + "".join(f"{figure:>11}" for figure in figures))
        first = last + 1
