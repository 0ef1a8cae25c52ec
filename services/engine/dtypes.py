"""Which number format a model runs in."""

from __future__ import annotations

import torch

from baton.services.core.errors import ConfigurationError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """One of "float32", "bfloat16" or "float16"."""
    return str(dtype).removeprefix("torch.")


def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware. Elsewhere float32 is several times faster."""
    query = getattr(torch.cpu, "get_capabilities", None)  # older torch cannot tell: treated as slow
    capabilities = query() if query is not None else {}
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def resolve_dtype(requested: str, checkpoint_dtype: str | None, device: torch.device) -> torch.dtype:
    """The format to run in. "auto" takes the checkpoint's, except where the device is slow in it: then float32."""
    if requested != "auto":
        if requested not in DTYPES:
            raise ConfigurationError(f"dtype: expected auto, {', '.join(DTYPES)}, found {requested!r}")
        return DTYPES[requested]
    dtype = DTYPES.get(checkpoint_dtype or "float32", torch.float32)
    if device.type == "cpu" and (dtype is torch.float16 or (dtype is torch.bfloat16 and not cpu_has_fast_bfloat16())):
        return torch.float32
    return dtype


def resolve_device(requested: str) -> torch.device:
    """With "auto", it is the first CUDA device if there is one, else the CPU."""
    if requested == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if requested not in ("cpu", "cuda"):
        raise ConfigurationError(f"device: expected auto, cpu or cuda, found {requested!r}")
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device: cuda was asked for, but torch finds no CUDA device")
    return torch.device("cuda", 0) if requested == "cuda" else torch.device("cpu")
