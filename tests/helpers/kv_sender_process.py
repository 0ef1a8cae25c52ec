"""A sending worker as a process of its own: told on standard input what to hand over, says on standard output how it went.

Lines in: ``<receiver json>`` first, then ``whole <request id> <block ids>`` or ``half <request id> <block ids>``.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys

from helpers.kv_agents import FIRST_TOKEN, LAYOUT, options, running

from baton.kvtransfer.identity import WorkerIdentity
from baton.kvtransfer.sending import HandoffSpec


async def main() -> None:
    transport = sys.argv[1]
    worker_id, incarnation, address = json.loads(sys.stdin.readline())
    async with running("prefill-0", transports=transport, options=options(heartbeat_s=0.1)) as node:
        for row in range(node.memory.num_blocks):
            node.write(row, random.Random(row).randbytes(LAYOUT.block_bytes))
        while line := await asyncio.to_thread(sys.stdin.readline):
            what, request_id, *blocks = line.split()
            block_ids = [int(block) for block in blocks]
            handoff = node.agent.open(
                HandoffSpec(
                    request_id,
                    1,
                    WorkerIdentity(worker_id, incarnation),
                    address,
                    [block_id.to_bytes(16, "little") for block_id in block_ids],
                    len(block_ids) * LAYOUT.block_size,
                )
            )
            if what == "half":
                handoff.blocks_ready({0: block_ids[0]})
                sys.stdout.write("pushing\n")
            else:
                handoff.blocks_ready(dict(enumerate(block_ids)))
                report = await handoff.commit(FIRST_TOKEN)
                sys.stdout.write(f"{report.transport} {report.num_blocks}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
