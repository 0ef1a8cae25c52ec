"""Threads and the allocator."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from baton.kernels import num_threads, set_num_threads


def test_threads_are_torchs() -> None:
    before = num_threads()
    assert before == torch.get_num_threads()
    set_num_threads(1)
    assert torch.get_num_threads() == 1
    set_num_threads(before)


PAGE_FAULTS = """
import resource, sys
import torch
from baton.kernels import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
torch.set_num_threads(1)
def step():  # larger than what malloc ever learns to keep by itself
    torch.empty(1 << 24).fill_(1)
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again() -> None:
    """By default each of the five buffers of 64 MiB comes as 16,384 fresh pages, and each page costs a fault."""
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS, "keep"], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16_384
