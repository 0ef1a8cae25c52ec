"""Compiles every Triton kernel for Hopper, as its wrapper would launch it: needs Triton and no GPU.

Run as a program, without TRITON_INTERPRET: the interpreter replaces the compiler for a whole process. Prints one line
per kernel; raises where one does not compile or does not fit.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton import kernels
from baton.kernels import launch, tuning

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_BYTES = 227 * 1024
LAUNCH_OPTIONS = ("num_warps", "num_stages")
MODULES = (
    "activation",
    "decode_attention",
    "kv_blocks",
    "kv_store",
    "layer_norm",
    "norm",
    "prefill_attention",
    "rope",
    "sampling_kernel",
)


class Recorder:
    """Stands in for a kernel and compiles what it would have launched."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
            names = self._kernel.arg_names
            values = dict(zip(names, args, strict=False)) | kwargs
            types = [_type_of(values[name], param) for name, param in zip(names, self._kernel.params, strict=True)]
            constants = {(i,): values[name] for i, name in enumerate(names) if types[i] == "constexpr"}
            # What the launcher sees in real arguments: aligned pointers, and sizes that are multiples of 16.
            aligned = [
                i for i, kind in enumerate(types) if kind[0] == "*" or (kind[0] == "i" and values[names[i]] % 16 == 0)
            ]
            attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
            source = ASTSource(self._kernel, dict(zip(names, types, strict=True)), constants, attributes)
            compiled = triton.compile(source, target=TARGET, options=options)
            assert compiled.metadata.shared <= SHARED_MEMORY_BYTES, compiled.metadata
            print(f"{self._kernel.fn.__name__}: {compiled.metadata.shared} bytes of shared memory", flush=True)

        return compile_launch


def _type_of(value: Any, param: Any) -> str:
    if param.is_constexpr:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(value.dtype)
        return f"*{element or str(value.dtype).removeprefix('torch.').replace('int', 'i')}"
    if isinstance(value, float):
        return "fp32"
    return "i64" if value > 2**31 - 1 else "i32"


def call_every_op(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """One launch of each kernel, and both attentions with and without a window."""
    x = torch.zeros(4, num_heads * head_dim, dtype=dtype)
    weight = x[0].clone()
    kernels.rms_norm(x, weight, 1e-5)
    kernels.fused_add_rms_norm(x, x, weight, 1e-5)
    kernels.layer_norm(x, weight, weight, 1e-5)
    kernels.silu_and_mul(x)
    kernels.gelu_and_mul(x, "tanh")
    kernels.gelu(x, "none")

    q = x.view(4, num_heads, head_dim)
    k = q[:, :num_kv_heads]
    positions = torch.arange(4)
    kernels.rotary_embedding(q, k, positions, torch.zeros(8, head_dim))
    cache = torch.zeros(8, 2, 2, 16, num_kv_heads, head_dim, dtype=dtype)
    k_cache, v_cache = cache[:, 1, 0], cache[:, 1, 1]
    kernels.store_kv(k, k, k_cache, v_cache, positions)
    kernels.gather_blocks(cache, positions, cache[:4].clone())
    kernels.scatter_blocks(cache, positions, cache[:4].clone())

    tables = torch.zeros(4, 256, dtype=torch.int32)
    lengths = torch.full((4,), 9, dtype=torch.int32)
    starts = torch.arange(5, dtype=torch.int32)
    for window in (None, 100):
        kernels.prefill_attention(q, k_cache, v_cache, tables, starts, lengths, 0.125, window)
    kernels.decode_attention(q, k_cache, v_cache, tables, lengths, 0.125, 1000)
    kernels.decode_attention(q[:1], k_cache, v_cache, tables[:1], lengths[:1], 0.125)  # few sequences: split and merged

    ones, zeros = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    kernels.sample(
        torch.zeros(4, 5000, dtype=dtype), kernels.SamplingTensors(ones, zeros.int(), ones, ones, zeros, zeros)
    )


def _record(module: ModuleType) -> None:
    for name, value in list(vars(module).items()):
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
            setattr(module, name, Recorder(value))


def main() -> int:
    for name in MODULES:
        _record(importlib.import_module(f"baton.kernels.{name}"))
    tuning._architecture = lambda device: tuning._HOPPER  # type: ignore[assignment]
    launch._backend = launch.Backend.TRITON
    call_every_op(torch.bfloat16, num_heads=9, num_kv_heads=3, head_dim=64)
    return 0


if __name__ == "__main__":
    sys.exit(main())
