"""Runs scenarios one after the other, on as few installations as will do."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from chaos.cluster import ChaosCluster, Options, run_cluster
from chaos.load import Reference
from chaos.report import Outcome
from chaos.results import Result
from chaos.run import Run
from chaos.scenario import Scenario
from helpers.tiny_models import make_model_dir

_RUN_TIMEOUT_S = 600.0  # beside the load's own deadline


class Suite:
    """Keeps one installation, and the answers of undisturbed runs, from scenario to scenario. Use ``open_suite``."""

    def __init__(self, model: Path, stack: AsyncExitStack) -> None:
        self._model = model
        self._outer = stack
        self._inner: AsyncExitStack | None = None
        self._cluster: ChaosCluster | None = None
        self._options: Options | None = None
        self._num_runs = 0
        self.reference = Reference()
        self.logs: Path | None = None  # where the processes' logs go when a scenario fails

    async def run(self, scenario: Scenario, say: Callable[[str], None] = lambda text: None) -> Outcome:
        """All variants of a scenario. A harness that cannot go on is a problem of the scenario, not an exception."""
        started_s = time.monotonic()
        total, problems, num_runs = Result(), [], 0
        for steps in scenario.variants():
            self._num_runs += 1
            name = f"{scenario.name}-{self._num_runs}"
            try:
                cluster = await self._get_cluster(scenario.options)
                async with asyncio.timeout(_RUN_TIMEOUT_S + scenario.load.deadline_s):
                    result = await Run(cluster, scenario, self.reference, name).execute(steps)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                problems.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
                await self._drop_cluster(name)
                break
            num_runs += 1
            total.add(result)
            problems += [f"{name}: {problem}" for problem in result.too_few(scenario.expect)]
            if found := result.problems(scenario.expect, is_all=False):
                say(f"{name}: {'; '.join(found)}")
                self._keep_logs(name)
        problems += total.problems(scenario.expect)
        return Outcome(scenario, total, problems, num_runs, time.monotonic() - started_s)

    async def _get_cluster(self, options: Options) -> ChaosCluster:
        if self._cluster is None or self._options != options:
            await self._drop_cluster()
            self._inner = AsyncExitStack()
            self._cluster = await self._inner.enter_async_context(run_cluster(options, self._model))
            self._options = options
        return self._cluster

    async def _drop_cluster(self, failed: str | None = None) -> None:
        if failed is not None:
            self._keep_logs(failed)
        inner, self._inner, self._cluster = self._inner, None, None
        if inner is not None:
            await inner.aclose()

    def _keep_logs(self, name: str) -> None:
        if self.logs is None or self._cluster is None:
            return
        folder = self.logs / name
        folder.mkdir(parents=True, exist_ok=True)
        for log in self._cluster.directory.glob("*.log"):
            (folder / log.name).write_bytes(log.read_bytes()[-500_000:])

    async def close(self) -> None:
        await self._drop_cluster()


@asynccontextmanager
async def open_suite(logs: Path | None = None) -> AsyncIterator[Suite]:
    """A suite with a small random model whose cache matters to its answers."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-chaos-model-")))
        model = await asyncio.to_thread(make_model_dir, "qwen3", directory / "model")
        suite = Suite(model, stack)
        suite.logs = logs
        stack.push_async_callback(suite.close)
        yield suite


async def run_scenarios(scenarios: Sequence[Scenario], logs: Path | None, say: Callable[[str], None]) -> list[Outcome]:
    outcomes = []
    async with open_suite(logs) as suite:
        for number, scenario in enumerate(scenarios, 1):
            say(f"{number}/{len(scenarios)} {' '.join(scenario.failures)} {scenario.name}: {scenario.says}")
            outcomes.append(outcome := await suite.run(scenario, say))
            say(
                f"    {'FAILED: ' + '; '.join(outcome.problems) if outcome.problems else 'ok'} ({outcome.took_s:.0f} s)"
            )
    return outcomes
