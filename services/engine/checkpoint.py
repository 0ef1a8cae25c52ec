"""The weights of a model folder, known from the headers of its safetensors files alone."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from baton.services.core.errors import ConfigurationError
from baton.services.engine.config_file import read_json_object
from baton.services.engine.safetensors_header import TensorInfo, read_header

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_LOADABLE_DTYPES = frozenset({"F32", "BF16", "F16", "F64"})
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# A digest reads small tensors whole and large ones in places spread evenly: under a hundredth of the file.
_WHOLE_BYTES = 1 << 16
_NUM_SAMPLES = 16
_SAMPLE_BYTES = 1 << 10


class Checkpoint:
    """``tensors`` of all files by the name that they have there. Opening it reads headers, no data."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], base_prefix: str) -> None:
        self.folder = folder
        self._tensors = tensors
        self._base_prefix = base_prefix

    @classmethod
    def open(cls, folder: Path, base_prefix: str = "") -> Checkpoint:
        """``base_prefix``: what checkpoints saved without the output head leave out at the front of names."""
        index = folder / INDEX_NAME
        if index.exists():
            return cls(folder, _read_shards(folder, index), base_prefix)
        files = sorted(folder.glob("*.safetensors"))
        whole = folder / WEIGHTS_NAME
        if whole in files:
            files = [whole]
        if len(files) > 1:
            raise ConfigurationError(f"{folder}: {len(files)} safetensors files, but no {INDEX_NAME} to join them")
        if not files:
            raise ConfigurationError(_no_weights(folder))
        return cls(folder, read_header(files[0]), base_prefix)

    def find(self, name: str) -> TensorInfo | None:
        return self._tensors.get(name) or self._tensors.get(name.removeprefix(self._base_prefix))

    def check(self, required: Mapping[str, tuple[int, ...]], ignored: Sequence[str]) -> None:
        """Compare with what a model asks for: name -> shape. ``ignored``: patterns of names that may be left over.

        Raises ConfigurationError for the first tensor that is missing, of the wrong shape or dtype, or asked for by nobody.
        """
        used: set[str] = set()
        for name, shape in required.items():
            tensor = self.find(name)
            if tensor is None:
                raise ConfigurationError(
                    f"{self.folder}: tensor {name!r} is missing: expected {list(shape)}, found nothing"
                )
            where = f"{tensor.path}: tensor {tensor.name!r}"
            if tensor.shape != shape:
                raise ConfigurationError(f"{where}: shape: expected {list(shape)}, found {list(tensor.shape)}")
            if tensor.dtype not in _LOADABLE_DTYPES:
                expected = ", ".join(sorted(_LOADABLE_DTYPES))
                raise ConfigurationError(f"{where}: dtype: expected one of {expected}, found {tensor.dtype}")
            used.add(tensor.name)
        for name, tensor in self._tensors.items():
            if name not in used and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
                raise ConfigurationError(
                    f"{tensor.path}: tensor {name!r} {list(tensor.shape)} has no place in this model: "
                    "config.json describes another one"
                )

    def digest(self, names: Sequence[str]) -> bytes:
        """Hash of these tensors' names, shapes, dtypes and samples of their content; the same however they are sharded."""
        digest = hashlib.blake2b(digest_size=16)
        files: dict[Path, int] = {}
        try:
            for name in sorted(names):
                tensor = self.find(name)
                if tensor is None:
                    raise KeyError(name)
                if tensor.path not in files:
                    files[tensor.path] = os.open(tensor.path, os.O_RDONLY)
                digest.update(f"{name}|{tensor.dtype}|{tensor.shape}|".encode())
                digest.update(_sample(files[tensor.path], tensor))
        finally:
            for descriptor in files.values():
                os.close(descriptor)
        return digest.digest()


def _sample(descriptor: int, tensor: TensorInfo) -> bytes:
    if tensor.num_bytes <= _WHOLE_BYTES:
        return os.pread(descriptor, tensor.num_bytes, tensor.offset)
    stride = (tensor.num_bytes - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1)
    return b"".join(
        os.pread(descriptor, _SAMPLE_BYTES, tensor.offset + place * stride) for place in range(_NUM_SAMPLES)
    )


def _read_shards(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigurationError(f"{index}: weight_map: expected an object of tensor names and files")
    tensors: dict[str, TensorInfo] = {}
    for file_name in sorted({str(value) for value in weight_map.values()}):
        # Only plain names: an index must not lead out of its folder.
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise ConfigurationError(f"{index}: weight_map: expected names of .safetensors files, found {file_name!r}")
        path = folder / file_name
        if not path.exists():
            lost = next(name for name, value in weight_map.items() if value == file_name)
            raise ConfigurationError(f"{path}: missing: {index.name} expects it to hold tensor {lost!r} and others")
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise ConfigurationError(f"{path}: tensor {name!r} is in {tensors[name].path.name} too")
            tensors[name] = tensor
    for name, file_name in weight_map.items():
        found = tensors.get(name)
        if found is None or found.path.name != file_name:
            where = "no file holds it" if found is None else f"found in {found.path.name}"
            raise ConfigurationError(
                f"{folder / str(file_name)}: tensor {name!r}: expected here by {index.name}, {where}"
            )
    return tensors


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder}: expected {WEIGHTS_NAME}, found only {', '.join(pickles[:3])}: pickled weights can run code and "
            "are never loaded; convert them to safetensors"
        )
    return f"{folder}: expected {WEIGHTS_NAME} or {INDEX_NAME}, found no weights"
