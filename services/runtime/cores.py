"""How many cores this process may use, and how many threads of it a transfer gets."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MAX_TRANSFER_THREADS = 4


def num_cores() -> int:
    """Cores that this process may use: its affinity, or less where a container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_QUOTA.read_text(encoding="utf-8").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroups, or no quota ("max")
        return cores


def transfer_threads(cores: int) -> tuple[int, int]:
    """Threads that hash what goes out, and threads that copy and hash what comes in, on a machine of so many cores.

    A quarter of the cores each, so that at least half stay free to compute.
    """
    quarter = min(cores // 4, _MAX_TRANSFER_THREADS)
    return max(1, quarter), max(2, quarter)
