"""Settings of the process that decide how fast the torch paths are on CPU."""

from __future__ import annotations

import ctypes

import torch

__all__ = ["keep_freed_memory", "num_threads", "set_num_threads"]

# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_ONE_GIB = 1 << 30


def num_threads() -> int:
    """Threads that one operation may use."""
    return torch.get_num_threads()


def set_num_threads(n: int) -> None:
    """Let one operation use ``n`` threads.

    More threads than free cores make operations many times slower: each ends with all threads waiting for the last.
    """
    torch.set_num_threads(n)


def keep_freed_memory() -> bool:
    """Have malloc keep freed memory for the next allocation. Returns whether it could (glibc only).

    By default glibc gives large buffers back to the kernel when they are freed, so that every step gets its activations as
    fresh pages, each one a fault and cleared again. Afterwards the process stays as large as it has ever been. To be called
    before the process starts threads: those share one heap from then on.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    taken = [mallopt(_M_MMAP_THRESHOLD, _ONE_GIB), mallopt(_M_TRIM_THRESHOLD, _ONE_GIB), mallopt(_M_ARENA_MAX, 1)]
    return taken == [1, 1, 1]
