"""What the machine can do at best, measured in the same run as what it is compared with."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import numpy as np
import torch

from baton.kvtransfer.mapping import create_mapping


class MemoryCopy:
    """One thread copying ``num_bytes`` between two mappings of the kind that block pools are made of, every page touched."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._source, self._target = (
            np.frombuffer(create_mapping(num_bytes)[0], np.uint8, count=num_bytes) for _ in range(2)
        )
        self._source[:] = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
        self._target[:] = 1  # page faults are not part of a copy

    def gb_per_s(self) -> float:
        """GB/s copied."""
        begin = time.perf_counter()
        np.copyto(self._target, self._source)
        return self._num_bytes / (time.perf_counter() - begin) / 1e9

    def close(self) -> None:
        """Nothing but memory."""


class DeviceCopy:
    """``num_bytes`` from a GPU into locked memory of the host: what blocks must do that are checked on the host."""

    def __init__(self, num_bytes: int) -> None:
        self._source = torch.ones(num_bytes, dtype=torch.uint8, device="cuda")
        self._target = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.gb_per_s()  # the first one is slower

    def gb_per_s(self) -> float:
        """GB/s copied."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self._target.copy_(self._source, non_blocking=True)
        torch.cuda.synchronize()
        return len(self._target) / (time.perf_counter() - begin) / 1e9

    def close(self) -> None:
        """Nothing but memory."""


class SocketLoop:
    """``num_bytes`` from a mapping of one process into one of another over TCP on loopback: no frames, no checksums.

    ``sendall`` there, ``recv_into`` here. The chunk and buffer sizes are those that were fastest.
    """

    def __init__(self, num_bytes: int, chunk_bytes: int = 1 << 20, buffer_bytes: int = 0) -> None:
        mapping, _, _ = create_mapping(num_bytes)
        self._view = memoryview(mapping)[:num_bytes]
        self._view[:] = bytes(num_bytes)
        self._chunk_bytes = chunk_bytes
        with socket.create_server(("127.0.0.1", 0)) as server:
            if buffer_bytes:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            arguments = map(str, (server.getsockname()[1], num_bytes, chunk_bytes, buffer_bytes))
            self._process = subprocess.Popen([sys.executable, "-m", "baton.load.socket_peer", *arguments])  # noqa: S603
            self._connection, _ = server.accept()
        self.gb_per_s()  # the first one is slower on both sides

    def gb_per_s(self) -> float:
        """GB/s from the first byte asked for to the last one received."""
        view, chunk_bytes = self._view, self._chunk_bytes
        begin = time.perf_counter()
        self._connection.sendall(b"1")
        total = 0
        while total < len(view):
            total += self._connection.recv_into(view[total : total + chunk_bytes])
        return total / (time.perf_counter() - begin) / 1e9

    def close(self) -> None:
        """Ends the other process."""
        self._connection.close()
        self._process.wait(timeout=30)


def matmul_flops_per_s(m: int = 512, k: int = 576, n: int = 3072) -> float:
    """A matrix product of the shape that dominates prefill of a 135M Llama, with torch's current threads.

    The better of float32 and bfloat16: a CPU without bfloat16 instructions is many times slower in it.
    """
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        for _ in range(3):  # the first one warms up
            begin = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best = max(best, 2 * m * k * n / (time.perf_counter() - begin))
    return best


def memory_read_gb_per_s(num_bytes: int = 512 << 20) -> float:
    """Reading a buffer that is too large for the caches with torch's current threads: what decoding is bound by."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32)
    data.sum()
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return num_bytes / best / 1e9
