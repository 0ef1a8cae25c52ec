"""A uvicorn application that does nothing but send recorded streams, event by event: the limit of what a gateway can stream.

``python -m baton.load.bare_app FILE [--in-turns | --every S]`` prints its port; FILE holds the streams, each ending in [DONE].
Requests get them in turn. ``--every``: an event of every stream at a time, as tokens of a batch come, each beginning with the
time at which it was due (``SAID``). It serves until it is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn

DONE = b"data: [DONE]\n\n"
# Then time.perf_counter(), up to a comma: a clock that the processes of one machine share.
SAID = b'data: {"said":'
_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


class BareApp:
    """Reads the body, then sends one event after another: at once, or, as tokens come, each in a turn of the loop of its own.

    Events that are sent in one turn leave in one write, which no stream of tokens that are made one by one can do.
    """

    def __init__(self, streams: list[list[bytes]], *, in_turns: bool = False, every_s: float = 0.0) -> None:
        self._streams = itertools.cycle(streams)
        self._in_turns = in_turns
        self._every_s = every_s
        self._step: asyncio.Future[float] | None = None  # the next one, with its time

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        for event in next(self._streams):
            if self._every_s:
                event = _stamped(event, await self._next_step())
            await send({"type": "http.response.body", "body": event, "more_body": True})
            if self._in_turns:
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})

    async def _next_step(self) -> float:
        """All streams wait for the same one."""
        if self._step is None:
            loop = asyncio.get_running_loop()
            self._step = loop.create_future()
            next_s = (loop.time() // self._every_s + 1) * self._every_s
            loop.call_at(next_s, self._make_step)
        return await self._step

    def _make_step(self) -> None:
        step, self._step = self._step, None
        assert step is not None
        step.set_result(time.perf_counter())


def _stamped(event: bytes, said_s: float) -> bytes:
    """As long as ``event``."""
    head = SAID + b'%.9f,"rest":"' % said_s
    return head + b"x" * (len(event) - len(head) - 4) + b'"}\n\n'


def split_events(stream: bytes) -> list[bytes]:
    """Its events, each with what ends it."""
    return [event + b"\n\n" for event in stream.split(b"\n\n") if event]


def serve(path: Path, *, in_turns: bool, every_s: float) -> None:
    """Until killed."""
    streams = [split_events(stream + DONE) for stream in path.read_bytes().split(DONE) if stream]
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(
        BareApp(streams, in_turns=in_turns, every_s=every_s),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    every_s = float(sys.argv[sys.argv.index("--every") + 1]) if "--every" in sys.argv else 0.0
    serve(Path(sys.argv[1]), in_turns="--in-turns" in sys.argv, every_s=every_s)
