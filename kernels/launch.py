"""Which implementation of a kernel runs, and the one place that imports Triton.

Every op has three implementations: a reference (``<op>_ref``, plain torch, written to be read), a torch path meant to
be fast on CPU, and a Triton kernel. ``BATON_KERNELS`` chooses between them:

=============  =======================================================================================
``auto``       Triton for CUDA tensors where Triton is installed, torch for everything else (default)
``torch``      the torch path on every device
``triton``     the Triton kernels; on CPU tensors they need ``TRITON_INTERPRET=1`` before the import
``reference``  the references
=============  =======================================================================================

Triton is imported only where it can run (a CUDA or ROCm build of torch, or the interpreter): it costs about half a
second at start-up and need not be installed at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import torch

__all__ = ["HAS_TRITON", "INTERPRETED", "Backend", "jit", "select", "set_backend", "tl", "use_backend"]

if TYPE_CHECKING:
    import triton.language as tl

Op = TypeVar("Op", bound=Callable[..., Any])


class Backend(StrEnum):
    """The implementations ``BATON_KERNELS`` can name."""

    AUTO = "auto"
    TORCH = "torch"
    TRITON = "triton"
    REFERENCE = "reference"


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED or torch.version.cuda is not None or torch.version.hip is not None:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = None
else:
    triton = None

if triton is None:
    # Annotations are never evaluated and kernels never called, so any object serves as the language module.
    tl = None

HAS_TRITON: bool = triton is not None


def jit(kernel: Callable[..., None]) -> Any:
    """``triton.jit`` where Triton was imported; otherwise the function as it is, which nothing calls."""
    return triton.jit(kernel) if triton is not None else kernel


def _checked(name: str) -> Backend:
    try:
        backend = Backend(name)
    except ValueError:
        raise ValueError(f"BATON_KERNELS is {name!r}; expected one of {', '.join(Backend)}") from None
    if backend is Backend.TRITON and not HAS_TRITON:
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


def select(device: torch.device, *, torch_path: Op, reference: Op, triton_path: Op | None = None) -> Op:
    """The implementation to run for tensors on ``device``."""
    if triton_path is not None and (
        _backend is Backend.TRITON or (_backend is Backend.AUTO and HAS_TRITON and device.type == "cuda")
    ):
        return triton_path
    return reference if _backend is Backend.REFERENCE else torch_path
