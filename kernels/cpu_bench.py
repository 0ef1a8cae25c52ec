# ruff: noqa: T201 (a program that prints)
"""``python -m baton.kernels.cpu_bench``: the torch paths on this CPU, beside the obvious way to do the same.

Shapes are those of a Llama of 135M parameters: hidden size 576, 9 query and 3 KV heads of 64, vocabulary 49,152. A call's
time is the median over rounds in which both ways take turns. Run it with ``OMP_NUM_THREADS`` set to the threads wanted.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from baton import kernels

_HEADS, _KV_HEADS, _HEAD_DIM, _HIDDEN, _BLOCK_SIZE = 9, 3, 64, 576, 16
_LINEARS = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # of a layer: [out_features, in_features]
_NUM_LAYERS = 8  # together larger than a cache, as in a model
_ROUNDS = 9

Call = Callable[[], object]


def linears(dtype: torch.dtype, num_rows: int) -> tuple[str, Call, Call]:
    """The four linear maps of a layer, weights cold."""
    weights = [torch.randn(shape).to(dtype) for _ in range(_NUM_LAYERS) for shape in _LINEARS]
    packed = [(kernels.pack_linear(weight), weight.shape[1]) for weight in weights]
    x = {size: torch.randn(num_rows, size).to(dtype) for size in (576, 1536)}
    return (
        f"{_NUM_LAYERS} layers' linears, {num_rows} rows: pack_linear / F.linear",
        lambda: [linear(x[size]) for linear, size in packed],
        lambda: [F.linear(x[weight.shape[1]], weight) for weight in weights],
    )


def _cache(dtype: torch.dtype, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (-(-num_tokens // _BLOCK_SIZE) + 1, 2, 2, _BLOCK_SIZE, _KV_HEADS, _HEAD_DIM)
    cache = torch.randn(shape).to(dtype)
    return cache[:, 1, 0], cache[:, 1, 1]


def decode(dtype: torch.dtype, batch: int, context: int) -> tuple[str, Call, Call]:
    """One layer's decode attention, beside one fused attention call per sequence with expanded KV heads."""
    k_cache, v_cache = _cache(dtype, batch * context)
    tables = torch.randperm(batch * context // _BLOCK_SIZE).view(batch, -1).int()
    lengths = torch.full((batch,), context, dtype=torch.int32)
    q = torch.randn(batch, _HEADS, _HEAD_DIM).to(dtype)
    plan = kernels.plan_decode(tables, lengths, _BLOCK_SIZE)

    def obvious() -> None:
        for b in range(batch):
            k, v = (c[tables[b]].flatten(0, 1).transpose(0, 1) for c in (k_cache, v_cache))
            F.scaled_dot_product_attention(q[b, :, None], k, v, enable_gqa=True)

    return (
        f"decode attention, {batch} x {context}: ours / call per sequence",
        lambda: kernels.decode_attention(q, k_cache, v_cache, tables, lengths, _HEAD_DIM**-0.5, plan=plan),
        obvious,
    )


def prefill(dtype: torch.dtype, new: int, context: int) -> tuple[str, Call, Call]:
    """One layer's prefill attention, beside one fused attention call with a mask of the whole chunk."""
    k_cache, v_cache = _cache(dtype, context)
    tables = torch.randperm(context // _BLOCK_SIZE)[None].int()
    lengths, starts = torch.tensor([context]).int(), torch.tensor([0, new]).int()
    q = torch.randn(new, _HEADS, _HEAD_DIM).to(dtype)

    def obvious() -> None:
        k, v = (c[tables[0]].flatten(0, 1).transpose(0, 1) for c in (k_cache, v_cache))
        mask = torch.ones(new, context, dtype=torch.bool).tril(context - new)
        F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True)

    return (
        f"prefill attention, {new} on {context}: ours / masked call",
        lambda: kernels.prefill_attention(q, k_cache, v_cache, tables, starts, lengths, _HEAD_DIM**-0.5),
        obvious,
    )


def sampling(batch: int, top_k: int, top_p: float) -> tuple[str, Call, Call]:
    """Sampling, beside sorting every row."""
    logits = 6 * torch.randn(batch, 49_152)
    rows = torch.arange(batch)
    params = kernels.SamplingTensors(
        torch.ones(batch),
        torch.full((batch,), top_k).int(),
        torch.full((batch,), top_p),
        torch.zeros(batch),
        rows,
        rows,
    )

    def obvious() -> None:
        values, order = logits.sort(dim=-1, descending=True)
        probabilities = values.softmax(dim=-1)
        probabilities[probabilities.cumsum(dim=-1) - probabilities >= top_p] = 0
        order.gather(1, probabilities.multinomial(1))

    return (
        f"sampling, {batch} rows, top_k {top_k}, top_p {top_p}: ours / sort",
        lambda: kernels.sample(logits, params),
        obvious,
    )


def problems() -> Iterator[tuple[str, tuple[str, Call, Call]]]:
    """What is timed, with its dtype's name."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for num_rows in (1, 16, 256):
            yield name, linears(dtype, num_rows)
        for batch, context in ((1, 2048), (16, 160)):
            yield name, decode(dtype, batch, context)
        for new, context in ((2048, 2048), (512, 2048)):
            yield name, prefill(dtype, new, context)
    for top_k, top_p in ((0, 1.0), (50, 0.9), (0, 0.9)):
        yield "float32", sampling(16, top_k, top_p)


def main() -> int:
    """Print a table."""
    kernels.keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {kernels.num_threads()} threads; ms")
    for dtype, (title, *ways) in problems():
        times: list[list[float]] = [[], []]
        for _ in range(_ROUNDS):
            for way, taken in zip(ways, times, strict=True):
                start = time.perf_counter()
                way()
                taken.append(1e3 * (time.perf_counter() - start))
        ours, obvious = (statistics.median(taken) for taken in times)
        print(f"{dtype:9} {title:70} {ours:9.3f} {obvious:9.3f}  {obvious / ours:5.2f}x", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
