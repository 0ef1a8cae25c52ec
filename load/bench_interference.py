"""What long prompts do to streams that are running: the gap between tokens, colocated against disaggregated at equal cores."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from baton.load.bench_engine import make_model_folder, write_tokenizer
from baton.load.report import Row
from baton.load.server import num_cores, serve
from baton.load.sse import stream_token_times

NUM_STREAMS = 4
PROMPT_TOKENS = 2048
# The next prompt comes when the one before has its first token, and this long after it at the earliest.
PROMPT_EVERY_S = 6.0
NUM_PROMPTS = 3


def bench_interference() -> list[Row]:
    """p99 inter-token latency of running streams, with 2,048-token prompts arriving and without any."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        make_model_folder(model)
        write_tokenizer(model)
        cores = num_cores()
        topologies = {
            "colocated": ("--mode", "colocated", "--threads-per-worker", str(cores)),
            "colocated, chunks of 256": (
                *("--mode", "colocated", "--threads-per-worker", str(cores)),
                *("--max-num-batched-tokens", "256"),
            ),
            "disaggregated": ("--threads-per-worker", str(max(1, cores // 2))),
        }
        figures: dict[str, dict[str, float]] = {}
        for topology, options in topologies.items():
            common = ("--model", str(model), "--served-model-name", "bench", "--dtype", "bfloat16")
            with serve(*common, *options, log=folder / f"{topology}.log") as url:
                figures[topology] = asyncio.run(_measure(url))
    for topology, figure in figures.items():
        rows.append(
            Row(
                f"p99 inter-token latency, {NUM_STREAMS} streams, {PROMPT_TOKENS}-token prompts arriving, {topology}",
                figure["loaded_p99_ms"],
                "ms",
                limit_name="without prompts",
                limit=figure["quiet_p99_ms"],
            )
        )
        rows.append(Row(f"median TTFT of those prompts, {topology}", figure["ttft_ms"], "ms"))
    for peer in ("colocated", "colocated, chunks of 256"):
        rows.append(
            Row(
                "p99 inter-token latency with prompts, disaggregated",
                figures["disaggregated"]["loaded_p99_ms"],
                "ms",
                limit_name=peer,
                limit=figures[peer]["loaded_p99_ms"],
            )
        )
    return rows


async def _measure(url: str) -> dict[str, float]:
    quiet_gaps, _ = await _run(url, num_prompts=0)
    loaded_gaps, ttfts = await _run(url, num_prompts=NUM_PROMPTS)
    return {
        "quiet_p99_ms": float(np.percentile(quiet_gaps, 99)),
        "loaded_p99_ms": float(np.percentile(loaded_gaps, 99)),
        "ttft_ms": float(np.median(ttfts)) if ttfts else 0.0,
    }


async def _run(url: str, num_prompts: int) -> tuple[list[float], list[float]]:
    """Gaps in ms of the steady streams while prompts arrive (or for a few seconds without any); the prompts' TTFTs."""
    stop = asyncio.Event()
    gaps: list[float] = []
    streams = [asyncio.create_task(_steady_stream(url, index, gaps, stop)) for index in range(NUM_STREAMS)]
    await asyncio.sleep(3.0)  # all four decode by now
    gaps.clear()
    ttfts: list[float] = []
    if num_prompts == 0:
        await asyncio.sleep(6.0)
    for index in range(num_prompts):
        begin = time.perf_counter()
        ttfts.append(await _time_to_first_token(url, seed=index + num_prompts * int(begin)))
        await asyncio.sleep(max(0.0, PROMPT_EVERY_S - (time.perf_counter() - begin)))
    measured = list(gaps)
    stop.set()
    for stream in streams:
        if stream.done():
            stream.result()  # it ended although nobody stopped it: raise what it died of
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    if not measured:
        raise RuntimeError("the steady streams brought no token while they were measured")
    return measured, ttfts


async def _steady_stream(url: str, index: int, gaps: list[float], stop: asyncio.Event) -> None:
    while not stop.is_set():
        body = _body([index + 1] * 16, max_tokens=1000)
        before: float | None = None
        async for at in stream_token_times(url, body):
            if before is not None:
                gaps.append((at - before) * 1e3)
            before = at


async def _time_to_first_token(url: str, seed: int) -> float:
    prompt = [(31 * seed + 7 * position) % 4000 + 1 for position in range(PROMPT_TOKENS)]
    begin = time.perf_counter()
    async for at in stream_token_times(url, _body(prompt, max_tokens=2)):
        return (at - begin) * 1e3
    raise RuntimeError("the stream ended before its first token")


def _body(prompt: list[int], max_tokens: int) -> bytes:
    body: dict[str, Any] = {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    return json.dumps(body).encode()
