"""Baton's kernels: the operations of a transformer step on a paged KV cache, on CPU and GPU.

``README.md`` has the glossary of dimensions, the cache layout and how to read and add a kernel.
"""

from baton.kernels.activation import gelu, gelu_and_mul, silu_and_mul
from baton.kernels.cpu import keep_freed_memory, num_threads, set_num_threads
from baton.kernels.decode_attention import decode_attention
from baton.kernels.decode_plan import DecodePlan, plan_decode
from baton.kernels.kv_blocks import gather_blocks, scatter_blocks
from baton.kernels.kv_store import store_kv
from baton.kernels.launch import Backend, set_backend, use_backend
from baton.kernels.layer_norm import layer_norm
from baton.kernels.linear import Linear, pack_linear
from baton.kernels.norm import fused_add_rms_norm, rms_norm
from baton.kernels.prefill_attention import prefill_attention
from baton.kernels.rope import build_rope_cache, rotary_embedding
from baton.kernels.sampling import SamplingTensors, sample

__all__ = [
    "Backend",
    "DecodePlan",
    "Linear",
    "SamplingTensors",
    "build_rope_cache",
    "decode_attention",
    "fused_add_rms_norm",
    "gather_blocks",
    "gelu",
    "gelu_and_mul",
    "keep_freed_memory",
    "layer_norm",
    "num_threads",
    "pack_linear",
    "plan_decode",
    "prefill_attention",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "scatter_blocks",
    "set_backend",
    "set_num_threads",
    "silu_and_mul",
    "store_kv",
    "use_backend",
]
