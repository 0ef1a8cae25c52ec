"""Recognising that a step did not fit into memory, and making room after it."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an error of its own for it; torch's CPU allocator and some libraries only have words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def release_memory(error: BaseException) -> None:
    """Lets go of what the failed step held, and of what torch keeps for the next one."""
    error.__traceback__ = None  # its frames hold the step's tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
