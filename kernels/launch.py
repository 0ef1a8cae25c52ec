"""Which implementation of a kernel runs, and the one place that imports Triton.

Every op has three implementations: a reference (``<op>_ref``, plain torch, written to be read), a torch path meant to
be fast on CPU, and a Triton kernel. ``BATON_KERNELS`` chooses between them:

=============  =======================================================================================
``auto``       Triton for CUDA tensors where Triton is installed and compiles, else torch (default)
``torch``      the torch path on every device
``triton``     the Triton kernels; on CPU tensors they need ``TRITON_INTERPRET=1`` before the import
``reference``  the references
=============  =======================================================================================

Triton need not be installed: without it the kernels are plain functions that nothing calls. It launches on the current
CUDA device, which must be the one of the tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import torch

__all__ = [
    "COMPILES",
    "HAS_TRITON",
    "INTERPRETED",
    "Backend",
    "cdiv",
    "dot_dtype",
    "jit",
    "next_power_of_2",
    "select",
    "set_backend",
    "tl",
    "use_backend",
]

if TYPE_CHECKING:
    import triton.language as tl

Op = TypeVar("Op", bound=Callable[..., Any])


class Backend(StrEnum):
    """The implementations ``BATON_KERNELS`` can name."""

    AUTO = "auto"
    TORCH = "torch"
    TRITON = "triton"
    REFERENCE = "reference"


INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}  # as Triton reads it

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None  # annotations are never evaluated, so any object serves as the language module

HAS_TRITON: bool = triton is not None
COMPILES = HAS_TRITON and not INTERPRETED and (torch.version.cuda is not None or torch.version.hip is not None)


def jit(kernel: Callable[..., Any]) -> Any:
    """``triton.jit`` where Triton was imported; otherwise the function as it is, which nothing calls."""
    return triton.jit(kernel) if triton is not None else kernel


def _checked(name: str) -> Backend:
    try:
        backend = Backend(name)
    except ValueError:
        raise ValueError(f"BATON_KERNELS is {name!r}; expected one of {', '.join(Backend)}") from None
    if backend is Backend.TRITON and not (COMPILES or (HAS_TRITON and INTERPRETED)):
        raise ValueError(
            "BATON_KERNELS is 'triton', but Triton cannot run here: it needs the triton package and a CUDA or ROCm "
            "build of torch, or TRITON_INTERPRET=1 in the environment"
        )
    return backend


_backend = _checked(os.environ.get("BATON_KERNELS", Backend.AUTO))


def set_backend(name: str) -> None:
    """Choose the implementation of every kernel from now on, as ``BATON_KERNELS`` does at start-up.

    Raises ValueError for an unknown name, and for ``triton`` where Triton cannot run.
    """
    global _backend
    _backend = _checked(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run a block with another implementation (tests, comparisons). Not for use by several threads at once."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def select(device: torch.device, *, torch_path: Op, triton_path: Op, reference: Op) -> Op:
    """The implementation to run for tensors on ``device``."""
    if _backend is Backend.AUTO:
        return triton_path if COMPILES and device.type == "cuda" else torch_path
    if _backend is Backend.TRITON:
        return triton_path
    return reference if _backend is Backend.REFERENCE else torch_path


def dot_dtype(dtype: torch.dtype) -> Any:
    """What a kernel's matrix products take their operands in: their own dtype, which the interpreter lacks for bfloat16."""
    if dtype is torch.float32 or (INTERPRETED and dtype is torch.bfloat16):
        return tl.float32
    return tl.bfloat16 if dtype is torch.bfloat16 else tl.float16


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``: the size of a kernel's tile over ``n`` elements."""
    return 1 << max(0, n - 1).bit_length()
