"""Reads and checks the header of one safetensors file, without touching its data.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data. The
safetensors library checks the same when it opens the file; here the answer names the tensor, and comes before any memory
is taken. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from baton.services.core.errors import ConfigurationError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    name: str
    path: Path
    dtype: str  # safetensors' word: "F32", "BF16", ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file by name. Raises ConfigurationError naming the file and, where one is at fault, the tensor."""
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            data_start = _LENGTH_BYTES + length
            if file_bytes < _LENGTH_BYTES or length > _MAX_HEADER_BYTES or data_start > file_bytes:
                raise ConfigurationError(
                    f"{path}: not a whole safetensors file: header length {length} bytes, file {file_bytes} bytes"
                )
            header = file.read(length)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    entries = _parse(path, header)
    tensors = [_read_entry(path, name, entry, data_start) for name, entry in entries.items() if name != "__metadata__"]
    _check_layout(path, tensors, data_start, file_bytes)
    return {tensor.name: tensor for tensor in tensors}


def _parse(path: Path, header: bytes) -> dict[str, object]:
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ConfigurationError(f"{path}: the safetensors header is not a JSON object")
    return entries


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON leaves open what a name given twice means; here it means that somebody is up to something."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return fields


def _read_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    def fail(what: str, expected: str, found: object) -> ConfigurationError:
        return ConfigurationError(f"{path}: tensor {name!r}: {what}: expected {expected}, found {found!r}")

    if not isinstance(entry, dict):
        raise fail("header entry", "an object", entry)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in _ITEM_BYTES:
        raise fail("dtype", f"one of {', '.join(_ITEM_BYTES)}", dtype)
    if not _are_counts(shape):
        raise fail("shape", "a list of sizes", shape)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("data_offsets", "two byte offsets in order", offsets)
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise fail("data_offsets", f"{num_bytes} bytes for {dtype} {shape}", offsets)
    return TensorInfo(name, path, dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(path: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """The tensors must fill the data exactly: no overlap, no hole, nothing after the end."""
    end, previous = data_start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset < end:
            raise ConfigurationError(
                f"{path}: tensor {tensor.name!r} overlaps {previous!r}: expected byte {end}, found {tensor.offset}"
            )
        if tensor.offset > end:
            raise ConfigurationError(
                f"{path}: {tensor.offset - end} bytes between {previous!r} and tensor {tensor.name!r} belong to nothing"
            )
        end, previous = tensor.offset + tensor.num_bytes, tensor.name
        if end > file_bytes:
            raise ConfigurationError(
                f"{path}: the file is truncated inside tensor {tensor.name!r}: expected {end} bytes, found {file_bytes}"
            )
    if end != file_bytes:
        raise ConfigurationError(f"{path}: expected {end} bytes, found {file_bytes}: the rest belongs to no tensor")
