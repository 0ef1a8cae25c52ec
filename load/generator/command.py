"""``baton bench``: an open loop of requests against any server with OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from baton.load.generator.arrivals import Arrival, arrival_times
from baton.load.generator.http_client import HttpClient, Target
from baton.load.generator.metrics import summarize
from baton.load.generator.prompts import PromptMaker, Vocabulary
from baton.load.generator.records import Outcome, RequestRecord
from baton.load.generator.results import Report, render, to_json, write_json, write_records
from baton.load.generator.runner import OpenLoop, RunResult
from baton.load.generator.sender import RequestMaker, Sender
from baton.load.generator.settings import DEFAULT_NUM_PROMPTS, BenchSettings, WorkloadOptions
from baton.load.generator.target import ServedModel, ServerUnusable, find_model, token_vocabulary, word_vocabulary
from baton.load.generator.traces import TraceError, parse_trace, scale_rows
from baton.load.generator.workload import Conversation, Lengths, from_trace, made_up, num_requests, until
from baton.load.report import machine
from baton.services.local.options import add_settings_command
from baton.services.runtime.certificates import CertificateProblem
from baton.services.runtime.client_tls import CA_VARIABLE
from baton.services.runtime.main import loop_factory
from baton.services.runtime.process import StopSignals
from baton.services.runtime.settings_loader import EXIT_BAD_CONFIGURATION, SettingsError

EXIT_FAILED = 1
# As a shell reports a command that Ctrl-C ended.
EXIT_INTERRUPTED = 130

_WARMUP_CONCURRENCY = 4


def bench_command() -> Any:
    """The command, for ``baton``."""
    app = typer.Typer(add_completion=False)
    add_settings_command(
        app, "bench", BenchSettings, run_bench, help_text="Measure a server: open-loop load, latencies, goodput."
    )
    return typer.main.get_command(app)


def run_bench(settings: BenchSettings) -> int:
    """Returns 0 when it ran to its end; 1 where the server cannot be measured, nothing was completed or too little was good;
    130 after Ctrl-C, with what there was saved."""
    if settings.self_check:
        from baton.load.generator.self_check import print_self_check

        return print_self_check()
    conversations = make_workload(settings)
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            report = runner.run(_measure(settings, conversations))
    except ServerUnusable as error:
        sys.stderr.write(f"baton bench: {settings.url}: {error}\n")
        return EXIT_FAILED
    except CertificateProblem as error:
        sys.stderr.write(f"baton bench: {error}\n")
        return EXIT_BAD_CONFIGURATION
    if report is None:
        sys.stderr.write("baton bench: interrupted before the run began; nothing was measured\n")
        return EXIT_INTERRUPTED
    _publish(report, settings)
    return _exit_status(report, settings)


def make_workload(settings: WorkloadOptions) -> list[Conversation]:
    """What the options ask for; the same for the same seed. Raises SettingsError for a trace that cannot be read."""
    arrival = settings.chosen_arrival
    rng = random.Random(settings.seed)

    def times(count: int) -> list[float]:
        burstiness = 1.0 if settings.burstiness is None else settings.burstiness
        return arrival_times(arrival, count, rate=settings.request_rate, burstiness=burstiness, rng=rng)

    if settings.trace is None:
        conversations = made_up(times(settings.num_prompts or DEFAULT_NUM_PROMPTS), settings.lengths(), rng)
    else:
        try:
            with settings.trace.open(encoding="utf-8") as file:
                rows = parse_trace(file, limit=settings.num_prompts)
        except (TraceError, OSError, UnicodeDecodeError) as error:
            raise SettingsError([f"--trace: {settings.trace}: {error}"]) from None
        rows = scale_rows(rows, time_scale=settings.time_scale, length_scale=settings.length_scale)
        conversations = from_trace(
            rows,
            None if arrival is Arrival.TRACE else times(len(rows)),
            max_input_len=settings.max_input_len,
            max_output_len=settings.max_output_len,
        )
    if settings.duration_s is not None:
        conversations = until(conversations, settings.duration_s)
        if not conversations:
            raise SettingsError([f"--duration-s: nothing is due in the first {settings.duration_s:g} s"])
    return conversations


async def _measure(settings: BenchSettings, conversations: list[Conversation]) -> Report | None:
    """None: interrupted before anything was measured."""
    target = Target.parse(settings.url)
    if settings.ca_file is not None:
        os.environ[CA_VARIABLE] = str(settings.ca_file)
    client = HttpClient(target, settings.headers())
    try:
        with StopSignals() as signals:
            preparing = asyncio.create_task(_prepare(settings, client))
            if not await _unless_stopped(preparing, signals.drain):
                return None
            model, vocabulary = preparing.result()
            loop = _Loops(settings, client, model, vocabulary)
            if settings.num_warmups:
                warm_up = await loop.warm_up(signals.drain)
                _check_warm_up(warm_up)
                if warm_up.is_interrupted:
                    return None
            with _Bar(num_requests(conversations), settings.progress) as bar:
                result = await loop.measure(conversations, signals.drain, bar)
    finally:
        client.close()
    summary = summarize(
        result.records,
        duration_s=result.duration_s,
        slo=settings.slo(),
        percentiles=settings.metric_percentiles,
    )
    return Report(result, summary, settings.slo(), _context(settings, model))


async def _prepare(settings: BenchSettings, client: HttpClient) -> tuple[ServedModel, Vocabulary[Any]]:
    model = await find_model(client, settings.served_model_name)
    if settings.prompt == "token-ids":
        return model, await token_vocabulary(client, model.name)
    return model, await word_vocabulary(client, model.name, settings.endpoint)


async def _unless_stopped(task: asyncio.Task[Any], stop: asyncio.Event) -> bool:
    """Whether ``task`` ended by itself; else it is cancelled."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
    is_done = task.done()
    for one in (task, stopping):
        one.cancel()
    await asyncio.wait((task, stopping))
    return is_done


class _Loops:
    """Runs against one server, which differ in what they send."""

    def __init__(
        self, settings: BenchSettings, client: HttpClient, model: ServedModel, vocabulary: Vocabulary[Any]
    ) -> None:
        extra = json.loads(settings.extra_body) if settings.extra_body else {}
        if settings.temperature is not None:
            extra["temperature"] = settings.temperature
        self._settings = settings
        self._client = client
        self._vocabulary = vocabulary
        self._requests = RequestMaker(model.name, settings.endpoint, extra, settings.ignore_eos)
        targets = settings.targets_ms() if settings.send_slo else {}
        self._slo_headers = {f"x-slo-{name}-ms": f"{targets[name]:g}" for name in ("ttft", "tpot") if name in targets}

    async def warm_up(self, stop: asyncio.Event) -> RunResult:
        """Prompts of their own, so that the measured ones find nothing of theirs in a cache."""
        settings = self._settings
        lengths = Lengths(min(settings.input_len, settings.max_input_len or settings.input_len), settings.output_len)
        conversations = made_up([0.0] * settings.num_warmups, lengths, random.Random(0))
        loop = self._loop(conversations, settings.seed + 1_000_003, max_concurrency=_WARMUP_CONCURRENCY)
        return await loop.run(stop)

    async def measure(self, conversations: list[Conversation], stop: asyncio.Event, bar: _Bar) -> RunResult:
        settings = self._settings
        loop = self._loop(conversations, settings.seed, max_concurrency=settings.max_concurrency, on_end=bar.on_end)
        return await loop.run(stop)

    def _loop(self, conversations: list[Conversation], seed: int, **options: Any) -> OpenLoop[Any]:
        settings = self._settings
        return OpenLoop(
            conversations,
            prompts=PromptMaker(self._vocabulary, seed),
            requests=self._requests,
            make_sender=lambda clock: Sender(
                self._client, settings.endpoint, timeout_s=settings.timeout_s, clock=clock
            ),
            session_prefix=f"bench-{random.getrandbits(32):08x}",
            headers=self._slo_headers,
            **options,
        )


def _check_warm_up(result: RunResult) -> None:
    """Requests that all fail before the load begins will not do better under it."""
    if result.records and all(record.outcome is Outcome.ERROR for record in result.records):
        raise ServerUnusable(f"every warm-up request failed: {result.records[0].error}")


class _Bar:
    """A progress bar on standard error, where that is a terminal."""

    def __init__(self, total: int, is_wanted: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[misses]}"),
            console=console,
            disable=not (is_wanted and console.is_terminal),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("requests", total=total, misses="")
        self._num_missed = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_end(self, record: RequestRecord) -> None:
        if record.outcome is not Outcome.COMPLETED:
            self._num_missed += 1
            self._progress.update(self._task, misses=f"[red]{self._num_missed} failed[/red]")
        self._progress.advance(self._task)


def _context(settings: BenchSettings, model: ServedModel) -> dict[str, Any]:
    arrival = settings.chosen_arrival
    has_rate = arrival in (Arrival.POISSON, Arrival.GAMMA, Arrival.CONSTANT)
    options = settings.model_dump(mode="json", exclude={"api_key", "header", "output", "records"})
    return {
        "title": f"{model.name} at {settings.url}",
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if settings.endpoint == "chat" else "openai",
        "backend": "openai-chat" if settings.endpoint == "chat" else "openai",
        "label": settings.label,
        "model_id": model.name,
        "tokenizer_id": model.name,
        "num_prompts": settings.num_prompts or (DEFAULT_NUM_PROMPTS if settings.trace is None else None),
        "request_rate": settings.request_rate if has_rate else ("inf" if arrival is Arrival.ALL_AT_ONCE else "trace"),
        "burstiness": 1.0 if settings.burstiness is None else settings.burstiness,
        "max_concurrency": settings.max_concurrency,
        "arrival": arrival.value,
        "seed": settings.seed,
        "options": options,
        "machine": machine(),
    }


def _publish(report: Report, settings: BenchSettings) -> None:
    Console().print(render(report))
    errors = report.summary.errors
    for error, count in sorted(errors.items(), key=lambda item: -item[1])[:5]:
        sys.stderr.write(f"baton bench: {count:,} x {error}\n")
    if len(errors) > 5:
        sys.stderr.write(f"baton bench: and {len(errors) - 5} other kinds of errors\n")
    for warning in report.warnings():
        sys.stderr.write(f"baton bench: {warning}\n")
    if settings.save:
        path = settings.output or Path("bench-results") / f"serve-{report.context['date']}.json"
        write_json(to_json(report, is_detailed=settings.save_detailed), path)
        print(f"JSON: {path}")
    if settings.records is not None:
        write_records(report.result.records, report.slo, settings.records)
        print(f"records: {settings.records}")


def _exit_status(report: Report, settings: BenchSettings) -> int:
    if report.result.is_interrupted:
        return EXIT_INTERRUPTED
    if not report.summary.completed:
        sys.stderr.write("baton bench: no request was completed\n")
        return EXIT_FAILED
    if settings.min_attainment is not None and report.summary.attainment[0] < settings.min_attainment:
        share = f"{report.summary.attainment[0]:.1%} of the requests were good"
        sys.stderr.write(f"baton bench: {share}, --min-attainment asks for {settings.min_attainment:.1%}\n")
        return EXIT_FAILED
    return 0
