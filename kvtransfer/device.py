"""What copies between a cache and rows of host memory need of the cache's device.

On a GPU: a stream of their own, and rows that are locked in memory, which the GPU reads and writes itself (of pageable memory
the driver makes a copy first). Elsewhere nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import torch

_log = structlog.get_logger(__name__)


class DeviceCopies:
    """For one cache and the ``num_bytes`` of host memory at ``address``. ``copying`` is for one thread."""

    def __init__(self, device: torch.device, address: int, num_bytes: int) -> None:
        self._device = device
        self._locked: int | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if self._lock(address, num_bytes):
                self._locked = address

    @contextmanager
    def copying(self) -> Iterator[None]:
        """What is enqueued in here comes after all that the engine has enqueued, and is done at the end.

        The engine's own stream is waited for on the device, not here: a step may still write blocks that were reported, or
        blocks of a request that has ended, when a copy of them is asked for.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            try:
                yield
            finally:
                self._stream.synchronize()

    def close(self) -> None:
        """Before the memory is unmapped."""
        if self._locked is not None:
            torch.cuda.cudart().cudaHostUnregister(self._locked)  # type: ignore[no-untyped-call]
            self._locked = None

    def _lock(self, address: int, num_bytes: int) -> bool:
        with torch.cuda.device(self._device):
            status = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))  # type: ignore[no-untyped-call]
        if status:
            _log.warning("kv_rows_not_locked", num_bytes=num_bytes, cuda_error=status)
        return not status
