"""The few calls of the CUDA runtime that sharing device memory with another process takes.

Through NVIDIA's own bindings (``cuda-bindings``, extra ``cuda-ipc``). What crosses a process boundary is CUDA's handle, 64
opaque bytes that only the driver reads; nothing is unpickled.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch

HANDLE_BYTES = 64


# Device and size -> allocations that are to be used again. As many as there were at once: a worker's rows have one size.
_retired: dict[tuple[int, int], list[int]] = {}


class CudaError(Exception):
    """A call of the CUDA runtime failed."""


class DeviceRuntime(Protocol):
    """Memory of one device, and a stream of its own to copy with. Addresses are numbers."""

    def allocate(self, num_bytes: int) -> int: ...

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """The allocation as [num_bytes] uint8."""
        ...

    def export(self, address: int) -> bytes:
        """The handle by which another process opens an allocation."""
        ...

    def open(self, handle: bytes) -> int: ...

    def close(self, address: int) -> None:
        """Of ``open``."""
        ...

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Enqueued on the stream. Between devices, or a device and the host."""
        ...

    def wait(self) -> None:
        """Until all that was enqueued is done."""
        ...

    def free(self, address: int) -> None:
        """Memory that was never exported."""
        ...

    def retire(self, address: int, num_bytes: int) -> None:
        """Memory that was exported: kept for the next ``allocate`` of this size.

        Another process may have it open, or be copying out of it, for as long as it likes, and CUDA leaves undefined what
        happens to those when it is freed before. What such a process reads then is another's bytes, and their checksum
        is wrong.
        """
        ...

    def bind_thread(self) -> None:
        """Called first on each thread that uses it."""
        ...


def open_runtime(device: torch.device) -> DeviceRuntime:
    """Raises ImportError without the bindings, CudaError where CUDA does not work."""
    return CudaRuntime(device)


class CudaRuntime:
    """The real one."""

    def __init__(self, device: torch.device) -> None:
        from cuda.bindings import runtime

        self._cuda: Any = runtime
        self._device = torch.device(device.type, device.index or 0)
        self.bind_thread()
        self._stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self._event = self._call("cudaEventCreateWithFlags", runtime.cudaEventDisableTiming)

    def bind_thread(self) -> None:
        self._call("cudaSetDevice", self._device.index)

    def allocate(self, num_bytes: int) -> int:
        if retired := _retired.get((self._device.index, num_bytes)):
            return retired.pop()
        # Not from torch's allocator: a handle stands for a whole allocation, and torch puts many tensors into one.
        return int(self._call("cudaMalloc", num_bytes))

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        return torch.as_tensor(_Allocation(address, num_bytes), device=self._device)

    def export(self, address: int) -> bytes:
        handle = self._call("cudaIpcGetMemHandle", address)
        return ctypes.string_at(handle.getPtr(), HANDLE_BYTES)

    def open(self, handle: bytes) -> int:
        opened = self._cuda.cudaIpcMemHandle_t()
        ctypes.memmove(opened.getPtr(), handle, HANDLE_BYTES)
        return int(self._call("cudaIpcOpenMemHandle", opened, self._cuda.cudaIpcMemLazyEnablePeerAccess))

    def close(self, address: int) -> None:
        self._call("cudaIpcCloseMemHandle", address)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault  # unified addresses say where each is
        self._call("cudaMemcpyAsync", target, source, num_bytes, kind, self._stream)

    def wait(self) -> None:
        self._call("cudaEventRecord", self._event, self._stream)
        self._call("cudaEventSynchronize", self._event)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def retire(self, address: int, num_bytes: int) -> None:
        _retired.setdefault((self._device.index, num_bytes), []).append(address)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise CudaError(f"{name}: {status.name}")
        return results[0] if results else None


class _Allocation:
    """What torch asks for to see foreign device memory as a tensor."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }
