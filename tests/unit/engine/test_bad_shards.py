"""Sharded weights that do not fit together are refused, naming file and tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.model_folders import edit_json, refusal
from safetensors.torch import load_file, save_file


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_missing_shard(sharded: Path) -> None:
    lost = shards(sharded)[1]
    lost.unlink()
    message = refusal(sharded)
    assert f"{lost}: missing: model.safetensors.index.json expects it to hold tensor" in message


def test_index_names_an_absent_tensor(sharded: Path) -> None:
    first = shards(sharded)[0].name
    edit_json(
        sharded / "model.safetensors.index.json", lambda index: index["weight_map"].update({"model.ghost": first})
    )
    message = refusal(sharded)
    assert "tensor 'model.ghost'" in message
    assert first in message
    assert "no file holds it" in message


def test_index_names_the_wrong_shard(sharded: Path) -> None:
    first, last = shards(sharded)[0].name, shards(sharded)[-1].name
    names: list[str] = []

    def swap(index: dict[str, Any]) -> None:
        names.append(next(name for name, file in index["weight_map"].items() if file == first))
        index["weight_map"][names[0]] = last

    edit_json(sharded / "model.safetensors.index.json", swap)
    message = refusal(sharded)
    assert f"tensor {names[0]!r}" in message
    assert f"found in {first}" in message


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = shards(sharded)[:2]
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second)
    assert f"{second}: tensor {name!r} is in {first.name} too" in refusal(sharded)


@pytest.mark.parametrize("file_name", ["../model/model-00001-of-00003.safetensors", "/etc/passwd", "pytorch_model.bin"])
def test_index_that_leads_elsewhere(sharded: Path, file_name: str) -> None:
    edit_json(
        sharded / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.norm.weight": file_name}),
    )
    assert f"expected names of .safetensors files, found {file_name!r}" in refusal(sharded)


def test_several_files_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "no model.safetensors.index.json to join them" in refusal(sharded)
