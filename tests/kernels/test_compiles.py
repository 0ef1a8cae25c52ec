"""Every kernel compiles for a GPU, which the interpreter does not show: it forgives what the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "compile_kernels.py"
KERNELS = {
    "_activation_kernel",
    "_copy_blocks_kernel",
    "_decode_attention_kernel",
    "_layer_norm_kernel",
    "_merge_splits_kernel",
    "_prefill_attention_kernel",
    "_rms_norm_kernel",
    "_rotary_embedding_kernel",
    "_sample_kernel",
    "_store_kv_kernel",
}


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} == KERNELS
