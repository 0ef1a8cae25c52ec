"""Philox4x32-10: random numbers as a function of (key, counter), without state.

Ten rounds of

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)),    (k0, k1) += (W0, W1)

on 32-bit words. Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3.

A draw takes the 64-bit seed as key and the 64-bit position as the low half of the counter, and keeps the first word: the
same seed and position give the same draw on any worker, in any batch.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["philox_u32", "philox_u32_ref"]

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox_u32_ref(key: int, counter: int) -> tuple[int, int, int, int]:
    """The four output words for a 64-bit key and a 128-bit counter."""
    k0, k1 = key & _MASK, key >> 32 & _MASK
    c0, c1, c2, c3 = (counter >> shift & _MASK for shift in (0, 32, 64, 96))
    for _ in range(_ROUNDS):
        product0, product1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = product1 >> 32 ^ c1 ^ k0, product1 & _MASK, product0 >> 32 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = k0 + _W0 & _MASK, k1 + _W1 & _MASK
    return c0, c1, c2, c3


def philox_u32(
    keys: torch.Tensor,  # [B] int64, the bit pattern of an unsigned number
    counters: torch.Tensor,  # [B] int64, likewise
) -> torch.Tensor:  # [B] int64 in [0, 2^32)
    """The first output word of each row. Computed on the host: the batch is a few dozen rows."""
    key, counter = (t.cpu().numpy().view(np.uint64) for t in (keys, counters))
    mask, shift = np.uint64(_MASK), np.uint64(32)
    k0, k1 = key & mask, key >> shift
    c0, c1 = counter & mask, counter >> shift
    c2 = c3 = np.zeros_like(c0)
    for _ in range(_ROUNDS):
        product0, product1 = c0 * np.uint64(_M0), c2 * np.uint64(_M1)  # 32 x 32 bits: exact in 64
        c0, c1, c2, c3 = product1 >> shift ^ c1 ^ k0, product1 & mask, product0 >> shift ^ c3 ^ k1, product0 & mask
        k0, k1 = k0 + np.uint64(_W0) & mask, k1 + np.uint64(_W1) & mask
    return torch.from_numpy(c0.view(np.int64)).to(keys.device)
