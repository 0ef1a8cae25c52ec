"""Host memory in the place of a GPU's, so that everything about ``cuda_ipc`` but CUDA itself runs where there is none."""

from __future__ import annotations

import ctypes
import itertools

import torch

from baton.kvtransfer.transport.cuda_runtime import HANDLE_BYTES, CudaError

_numbers = itertools.count(1)
_exported: dict[bytes, int] = {}

retired: list[torch.Tensor] = []
"""Memory that is kept since somebody may still have it open."""


class HostCuda:
    """A ``DeviceRuntime``. ``fail_with``: what the next wait raises. ``num_opened`` counts handles that are not closed."""

    def __init__(self, device: torch.device) -> None:
        self.fail_with: CudaError | None = None
        self.num_opened = 0
        self._allocated: dict[int, torch.Tensor] = {}
        self._queue: list[tuple[int, int, int]] = []

    def bind_thread(self) -> None:
        pass

    def allocate(self, num_bytes: int) -> int:
        tensor = torch.zeros(num_bytes, dtype=torch.uint8)
        self._allocated[tensor.data_ptr()] = tensor
        return tensor.data_ptr()

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        return self._allocated[address][:num_bytes]

    def export(self, address: int) -> bytes:
        handle = next(_numbers).to_bytes(HANDLE_BYTES, "little")
        _exported[handle] = address
        return handle

    def open(self, handle: bytes) -> int:
        if handle not in _exported:
            raise CudaError("cudaIpcOpenMemHandle: cudaErrorInvalidResourceHandle")
        self.num_opened += 1
        return _exported[handle]

    def close(self, address: int) -> None:
        self.num_opened -= 1

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        self._queue.append((target, source, num_bytes))  # a stream: nothing has happened before ``wait``

    def wait(self) -> None:
        queue, self._queue = self._queue, []
        if self.fail_with is not None:
            raise self.fail_with
        for target, source, num_bytes in queue:
            ctypes.memmove(target, source, num_bytes)

    def free(self, address: int) -> None:
        del self._allocated[address]
        for handle in [handle for handle, known in _exported.items() if known == address]:
            del _exported[handle]

    def retire(self, address: int, num_bytes: int) -> None:
        retired.append(self._allocated.pop(address))
