"""A uvicorn application that does nothing but send recorded streams, event by event: the limit of what a gateway can stream.

``python -m baton.load.bare_app FILE [--in-turns]`` prints its port; FILE holds the streams, each ending in [DONE]. Requests get
them in turn. It serves until it is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn

DONE = b"data: [DONE]\n\n"
_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


class BareApp:
    """Reads the body, then sends one event after another: at once, or, as tokens come, each in a turn of the loop of its own.

    Events that are sent in one turn leave in one write, which no stream of tokens that are made one by one can do.
    """

    def __init__(self, streams: list[list[bytes]], *, in_turns: bool) -> None:
        self._streams = itertools.cycle(streams)
        self._in_turns = in_turns

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        for event in next(self._streams):
            await send({"type": "http.response.body", "body": event, "more_body": True})
            if self._in_turns:
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})


def split_events(stream: bytes) -> list[bytes]:
    """Its events, each with what ends it."""
    return [event + b"\n\n" for event in stream.split(b"\n\n") if event]


def serve(path: Path, *, in_turns: bool) -> None:
    """Until killed."""
    streams = [split_events(stream + DONE) for stream in path.read_bytes().split(DONE) if stream]
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(
        BareApp(streams, in_turns=in_turns), log_config=None, access_log=False, lifespan="off", server_header=False
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    serve(Path(sys.argv[1]), in_turns="--in-turns" in sys.argv)
