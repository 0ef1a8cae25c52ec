"""What the machine can do at best, measured in the same run as what it is compared with."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import torch


def memcpy_gb_per_s(num_bytes: int) -> float:
    """One thread copying ``num_bytes`` between two buffers that are too large for the caches. GB/s copied."""
    source = np.ones(num_bytes, np.uint8)
    target = np.full(num_bytes, 2, np.uint8)  # touched: page faults are not part of a copy
    begin = time.perf_counter()
    np.copyto(target, source)
    return num_bytes / (time.perf_counter() - begin) / 1e9


def socket_gb_per_s(num_bytes: int, chunk_bytes: int = 1 << 20) -> float:
    """A plain TCP connection over loopback: sendall in one thread, recv_into in another. GB/s."""
    payload = memoryview(bytearray(chunk_bytes))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

        def send() -> None:
            with socket.create_connection(address) as connection:
                for _ in range(num_bytes // chunk_bytes):
                    connection.sendall(payload)

        sender = threading.Thread(target=send)
        sender.start()
        connection, _ = server.accept()
        with connection:
            buffer = memoryview(bytearray(chunk_bytes))
            begin = time.perf_counter()
            total = 0
            while count := connection.recv_into(buffer):
                total += count
            elapsed = time.perf_counter() - begin
        sender.join()
    return total / elapsed / 1e9


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
