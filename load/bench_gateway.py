"""What the gateway alone costs: streaming against a bare uvicorn application, latency of a token, and /health under load.

Behind it a worker says tokens without computing any (``token_source``). All are processes of one machine, so on few cores they
take each other's time; value and limit are measured in turns.
"""

from __future__ import annotations

import asyncio
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from baton.load.bare_app import DONE, SAID, split_events
from baton.load.report import Row, median_row
from baton.load.server import gateway

NUM_STREAMS = 32
NUM_TOKENS = 1024
REPEATS = 5
# A calm rate for latencies: 16 streams of 25 tokens a second.
LATENCY_STREAMS = 16
LATENCY_TOKENS = 250
LATENCY_EVERY_S = 0.04
LATENCY_REPEATS = 2
LONG_PROMPT_BYTES = 2_000_000
HEALTH_S = 10.0


def bench_gateway() -> list[Row]:
    """MB/s of 32 streams; milliseconds from a worker's token to its client; milliseconds of /health under all that."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _token_source(0.0) as fast, gateway(fast.address, log=folder / "gateway.log") as url:
            asyncio.run(_record(url))  # warms up
            recorded = asyncio.run(_record(url))
            (folder / "streams").write_bytes(b"".join(recorded))
            calm = [b"".join(split_events(stream)[:LATENCY_TOKENS]) + DONE for stream in recorded]
            (folder / "calm").write_bytes(b"".join(calm))
            ours: list[float] = []
            bare: dict[str, list[float]] = {option: [] for option in ("", "--in-turns")}
            for _ in range(REPEATS):
                ours.append(asyncio.run(_mb_per_s(url)))
                for option, figures in bare.items():
                    with _bare_app(folder / "streams", *option.split()) as bare_url:
                        figures.append(asyncio.run(_mb_per_s(bare_url)))
            health_ms = asyncio.run(_health_under_load(url))
        with _token_source(LATENCY_EVERY_S) as slow, gateway(slow.address, log=folder / "latency.log") as url:
            latencies: dict[str, list[float]] = {"ours": [], "bare": []}
            for _ in range(LATENCY_REPEATS):
                latencies["ours"] += asyncio.run(_latency_ms(url, slow))
                with _bare_app(folder / "calm", "--every", str(LATENCY_EVERY_S)) as bare_url:
                    latencies["bare"] += asyncio.run(_bare_latency_ms(bare_url))
    num_events = sum(len(split_events(stream)) for stream in recorded) / NUM_STREAMS
    streams = f"{NUM_STREAMS} streams of {NUM_TOKENS} tokens in {num_events:.0f} events"
    return [
        median_row(f"gateway: {streams}", "MB/s", ours, "bare uvicorn app, same bytes:", bare[""]),
        median_row("the same", "MB/s", ours, "bare app, each event in its own turn:", bare["--in-turns"]),
        *_latency_rows(50, 1.0, latencies["ours"], latencies["bare"]),
        *_latency_rows(99, 5.0, latencies["ours"], latencies["bare"]),
        Row(
            f"/health during {NUM_STREAMS} such streams and 2 MB prompts, slowest of {len(health_ms)}",
            max(health_ms),
            "ms",
            tuple(health_ms),
            limit_name="wanted:",
            limit=100.0,
        ),
    ]


def _latency_rows(share: int, wanted_ms: float, ours: list[float], bare: list[float]) -> list[Row]:
    """A percentile as it is, beside that of the bare application, and what is left without that."""
    value, floor = float(np.percentile(ours, share)), float(np.percentile(bare, share))
    name = f"token from worker to client, p{share}"
    return [
        Row(name, value, "ms", limit_name="wanted:", limit=wanted_ms),
        Row("the same", value, "ms", limit_name="bare app, from its step to client:", limit=floor),
        Row("the difference of these two", value - floor, "ms", limit_name="wanted:", limit=wanted_ms),
    ]


class _Source:
    """The process of ``token_source``."""

    def __init__(self, every_s: float) -> None:
        command = [sys.executable, "-m", "baton.load.token_source", str(every_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        self.address = self._read().strip()

    def take_times(self) -> dict[str, list[float]]:
        """See ``TokenSource.take_times``."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        times: dict[str, list[float]] = json.loads(self._read())
        return times

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def _token_source(every_s: float) -> Iterator[_Source]:
    source = _Source(every_s)
    try:
        yield source
    finally:
        source.close()


@contextmanager
def _bare_app(streams: Path, *options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "baton.load.bare_app", str(streams), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def _body(num_tokens: int) -> bytes:
    fields = {"prompt": [1, 2, 3], "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    return json.dumps(fields).encode()


async def _stream(url: str, body: bytes, on_data: Any = None, request_id: str = "") -> bytes:
    """POSTs to /v1/completions and takes what comes until the end. ``on_data`` is given each piece; returned are all if not."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n"
    )
    head += f"x-request-id: {request_id}\r\n\r\n" if request_id else "\r\n"
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(2000)).decode(errors='replace')}")
    await reader.readuntil(b"\r\n\r\n")
    pieces = []
    while piece := await reader.read(1 << 16):
        if on_data is None:
            pieces.append(piece)
        else:
            on_data(piece)
    writer.close()
    return b"".join(pieces)


async def _record(url: str) -> list[bytes]:
    """All streams, run at once, each as its events without HTTP's chunks around them."""
    streams = await asyncio.gather(*(_stream(url, _body(NUM_TOKENS)) for _ in range(NUM_STREAMS)))
    recorded = [b"".join(line for line in raw.split(b"\r\n") if line.startswith(b"data: ")) for raw in streams]
    if not all(stream.endswith(DONE) and b'"error"' not in stream for stream in recorded):
        raise RuntimeError("a stream did not end well")
    return recorded


async def _mb_per_s(url: str) -> float:
    num_bytes = 0

    def count(piece: bytes) -> None:
        nonlocal num_bytes
        num_bytes += len(piece)

    begin = time.perf_counter()
    await asyncio.gather(*(_stream(url, _body(NUM_TOKENS), count) for _ in range(NUM_STREAMS)))
    return num_bytes / (time.perf_counter() - begin) / 1e6


async def _latency_ms(url: str, source: _Source) -> list[float]:
    """Of every token of every stream but the first second's, in which connections are made."""
    arrivals: list[list[float]] = [[] for _ in range(LATENCY_STREAMS)]

    def note(index: int, piece: bytes) -> None:
        arrivals[index] += [time.perf_counter()] * piece.count(b"data: {")

    source.take_times()
    streams = []
    for index in range(LATENCY_STREAMS):
        on_data = functools.partial(note, index)
        streams.append(_stream(url, _body(LATENCY_TOKENS), on_data, request_id=_stream_name(index)))
    await asyncio.gather(*streams)
    # The ids that workers know begin with the client's.
    said = {request_id.partition(".")[0]: times for request_id, times in source.take_times().items()}
    skipped = int(1.0 / LATENCY_EVERY_S)
    latencies: list[float] = []
    for index, heard in enumerate(arrivals):
        pairs = list(zip(said[_stream_name(index)], heard, strict=True))
        latencies += [(heard_s - said_s) * 1e3 for said_s, heard_s in pairs[skipped:]]
    return latencies


async def _bare_latency_ms(url: str) -> list[float]:
    """The same of a bare application that steps at the same pace."""
    arrivals: list[list[float]] = [[] for _ in range(LATENCY_STREAMS)]

    def note(index: int, piece: bytes) -> None:
        heard_s = time.perf_counter()
        arrivals[index] += [(heard_s - float(event.partition(b",")[0])) * 1e3 for event in piece.split(SAID)[1:]]

    async def read(index: int) -> None:
        await _stream(url, _body(LATENCY_TOKENS), functools.partial(note, index))

    await asyncio.gather(*map(read, range(LATENCY_STREAMS)))
    skipped = int(1.0 / LATENCY_EVERY_S)
    return [latency for stream in arrivals for latency in stream[skipped:]]


def _stream_name(index: int) -> str:
    return f"stream-{index}"


async def _health_under_load(url: str) -> list[float]:
    """Milliseconds of each GET /health, on a connection of its own, while streams run and long prompts are tokenised."""
    is_over = False

    async def keep_streaming() -> None:
        while not is_over:
            await _stream(url, _body(NUM_TOKENS), lambda piece: None)

    async def keep_tokenizing() -> None:
        body = json.dumps({"prompt": "a long story " * (LONG_PROMPT_BYTES // 13), "max_tokens": 1}).encode()
        while not is_over:
            try:
                await _stream(url, body, lambda piece: None)
            except RuntimeError as error:  # it is longer than the context: told when it has been tokenised
                if " 400 " not in str(error):
                    raise

    load = [asyncio.ensure_future(keep_streaming()) for _ in range(NUM_STREAMS)]
    load.append(asyncio.ensure_future(keep_tokenizing()))
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < HEALTH_S:
        await asyncio.sleep(0.1)
        times.append(await asyncio.to_thread(_health_ms, url))
    is_over = True
    await asyncio.gather(*load)
    return times


def _health_ms(url: str) -> float:
    from urllib.request import urlopen

    begin = time.perf_counter()
    with urlopen(f"{url}/health", timeout=30) as response:  # noqa: S310  our own server on loopback
        response.read()
    return (time.perf_counter() - begin) * 1e3
