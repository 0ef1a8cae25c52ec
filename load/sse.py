"""A minimal streaming client: when each event of a completion arrived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from urllib.parse import urlsplit


async def stream_token_times(url: str, body: bytes) -> AsyncGenerator[float, None]:
    """POSTs to /v1/completions and yields time.perf_counter() of every data event but the last ([DONE]).

    Raises RuntimeError for an answer that is not 200. Closing the generator closes the connection.
    """
    split = urlsplit(url)
    reader, writer = await asyncio.open_connection(split.hostname, split.port)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {split.netloc}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(2000)).decode(errors='replace')}")
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                if b'"error"' in line[:16]:
                    raise RuntimeError(line.decode(errors="replace"))
                yield time.perf_counter()
    finally:
        writer.close()
