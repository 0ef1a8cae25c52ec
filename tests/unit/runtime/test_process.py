"""What a process owes the machine that it runs on."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Products of a new number of rows each time, as prompts bring them; then how much private memory the later ones added.
SCRIPT = """
from baton.services.runtime.process import bound_primitive_caches
bound_primitive_caches()
import torch
from baton.kernels import pack_linear

def private_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

torch.set_num_threads(1)
linear = pack_linear(torch.randn(64, 64))
for rows in range(1, 401):
    linear(torch.randn(rows, 64))
before = private_mib()
for rows in range(401, 601):
    linear(torch.randn(rows, 64))
print(private_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_products_of_ever_new_sizes_do_not_fill_the_memory() -> None:
    """Once the caches are full and the allocator has its pages, new sizes take nothing."""
    run = subprocess.run([sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, timeout=240, check=True)
    assert float(run.stdout) < 20
