"""What a process holds of the system, and by how much it is more than it held before.

A pair of workers opens its connections when it first has something to send, in each direction its own. Those are therefore no
leak, whenever they came; one more is, unless it was there before.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# That a process keeps to another, by what they are for: handing over and asking for blocks have a channel each. One that had
# lost NATS when it was counted first may have found it again.
_KEPT = {"grpc": 2, "kv": 1, "nats": 1}


@dataclass(frozen=True, slots=True)
class Held:
    """Descriptors of one process. ``outgoing`` and ``incoming`` count connections by the link's end, as ``decode-0:kv``."""

    files: int
    segments: int  # memory that has no name but can be shared, and is counted in ``files`` as well
    outgoing: Counter[str] = field(default_factory=Counter)
    incoming: Counter[str] = field(default_factory=Counter)


def held_by_process(pid: int, reached: Mapping[int, str], listened: Mapping[int, str]) -> Held:
    """``reached``: the ports by which others are reached; ``listened``: those that this process listens on."""
    outgoing: Counter[str] = Counter()
    incoming: Counter[str] = Counter()
    connections = {c.fd: c for c in psutil.Process(pid).net_connections("tcp") if c.raddr}
    files = segments = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            target = os.readlink(descriptor)
            connection = connections.get(int(descriptor.name))
            if connection is not None and connection.raddr.port in reached:
                outgoing[reached[connection.raddr.port]] += 1
            elif connection is not None and connection.laddr.port in listened:
                incoming[listened[connection.laddr.port]] += 1
            else:
                files += 1
                segments += "memfd:" in target or "/dev/shm/" in target
    return Held(files, segments, outgoing, incoming)


def more_held(before: Mapping[tuple[str, int], Held], now: Mapping[tuple[str, int], Held]) -> dict[str, int]:
    """By how much processes that lived through it all hold more than before, or than their peers keep open to them."""
    more: Counter[str] = Counter()
    reached = sum((held.outgoing for held in now.values()), Counter())
    for key in before.keys() & now.keys():
        was, is_now, name = before[key], now[key], key[0]
        more[f"{name} files"] = is_now.files - was.files
        more[f"{name} segments"] = is_now.segments - was.segments
        for end, number in is_now.outgoing.items():
            more[f"{name} connections to {end}"] = number - max(_KEPT.get(end.partition(":")[2], 0), was.outgoing[end])
        for end, number in is_now.incoming.items():
            more[f"{name} connections from nobody to {end}"] = number - max(reached[end], was.incoming[end])
    return {name: number for name, number in more.items() if number > 0}
