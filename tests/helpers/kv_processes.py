"""A sending worker in a process of its own (``kv_sender_process.py``), and how to ask it for handoffs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from helpers.kv_agents import Node

from baton.kvtransfer.identity import HandoffKey, WorkerIdentity

SENDER = WorkerIdentity("prefill-0", "1" * 32)
_PROGRAM = Path(__file__).with_name("kv_sender_process.py")


@asynccontextmanager
async def sender_process(node: Node, transport: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Ends when its input does; a test may kill it before."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(_PROGRAM),
        transport,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    receiver = [node.identity.worker_id, node.identity.incarnation, node.address]
    process.stdin.write(json.dumps(receiver).encode() + b"\n")
    try:
        yield process
    finally:
        if process.returncode is None:
            process.stdin.close()
        await asyncio.wait_for(process.wait(), 20)


async def ask(process: asyncio.subprocess.Process, node: Node, what: str, request_id: str, *block_ids: int) -> str:
    """``whole`` or ``half`` of these blocks; the transport and their number, or ``pushing``."""
    node.agent.expect(HandoffKey(request_id, 1), SENDER)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{what} {request_id} {' '.join(map(str, block_ids))}\n".encode())
    while True:  # the program logs on standard output too
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        assert line, "the sender died"
        if line.startswith(("shm ", "tcp ", "cuda_ipc ", "pushing")):
            return line.strip()


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(_PROGRAM.parents[1]), os.environ.get("PYTHONPATH"))))
