"""A model folder that cannot be served is refused with file, tensor or field, expected and found; nothing in it runs."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_folders import edit_header, edit_json, edit_tensors, refusal
from helpers.tiny_models import make_model_dir
from safetensors.torch import load_file, save_file

from baton.services.core.errors import ConfigurationError
from baton.services.engine.loader import load_model


def test_the_untouched_folders_load(pristine: Path, pristine_sharded: Path) -> None:
    """Sharded or whole, it is the same model."""
    assert len(list(pristine_sharded.glob("*.safetensors"))) > 2
    assert load_model(pristine, device="cpu").fingerprint == load_model(pristine_sharded, device="cpu").fingerprint


# --- config.json


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_attention_heads", 0, "num_attention_heads: expected an integer from 1 to 2048, found 0"),
        ("num_attention_heads", True, "num_attention_heads: expected an integer"),
        ("num_attention_heads", "6", "found '6'"),
        ("num_hidden_layers", 10**9, "num_hidden_layers: expected an integer from 1 to 1024, found 1000000000"),
        ("num_key_value_heads", 4, "num_key_value_heads: expected a divisor of num_attention_heads (6), found 4"),
        ("head_dim", 15, "head_dim"),
        ("head_dim", -16, "head_dim: expected an integer from 1"),
        ("vocab_size", 2**40, "vocab_size"),
        ("max_position_embeddings", 0, "max_position_embeddings"),
        ("rms_norm_eps", "tiny", "rms_norm_eps"),
        ("hidden_act", "swish2", "hidden_act: expected one of gelu, gelu_pytorch_tanh, silu, found 'swish2'"),
        ("attention_bias", "no", "attention_bias: expected true or false, found 'no'"),
        ("quantization_config", {"quant_method": "fp8"}, "quantised weights are not supported"),
        ("architectures", ["MambaForCausalLM"], "architecture 'MambaForCausalLM' is not supported; supported are"),
        ("architectures", None, "architectures: expected a list with one name, found nothing"),
        ("eos_token_id", "</s>", "eos_token_id: expected a token id or a list of token ids"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ],
)
def test_config_value(folder: Path, field: str, value: object, words: str) -> None:
    edit_json(folder / "config.json", lambda config: config.update({field: value}))
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert words in message


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rope_type", "yarn", "rope_parameters.rope_type: expected one of default, linear, llama3, found 'yarn'"),
        ("rope_theta", float("nan"), "rope_parameters.rope_theta"),
        ("rope_theta", -1.0, "rope_parameters.rope_theta: expected a number from 1 to 1e+12, found -1.0"),
        ("factor", 0.0, "rope_parameters.factor"),
        ("factor", None, "rope_parameters.factor: expected a number from 1 to 1e+06, found nothing"),
        ("high_freq_factor", 0.5, "expected more than low_freq_factor (1), found 0.5"),
        ("full_attention", {"rope_theta": 1.0}, "expected one set of rotary parameters for all layers"),
    ],
)
def test_rope_value(folder: Path, field: str, value: object, words: str) -> None:
    edit_json(folder / "config.json", lambda config: config["rope_parameters"].update({field: value}))
    assert words in refusal(folder)


def test_rope_in_the_words_of_transformers_4(pristine: Path, folder: Path) -> None:
    def rewrite(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope

    edit_json(folder / "config.json", rewrite)
    assert load_model(folder, device="cpu").config == load_model(pristine, device="cpu").config


def test_unsupported_architecture_lists_the_supported(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(architectures=["T5ForConditionalGeneration"]))
    message = refusal(folder)
    for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "OPT"):
        assert f"{name}ForCausalLM" in message
    assert "GPT2LMHeadModel" in message


def test_code_in_the_folder_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Model: pass\n")
    edit_json(
        folder / "config.json", lambda config: config.update(auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})
    )
    assert "auto_map: expected no such field: code from a model folder is never run" in refusal(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("[" * 100_000, "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_config_that_is_no_json_object(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert words in refusal(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder / 'config.json'}: no such file"


def test_bad_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": -1}')
    message = refusal(folder)
    assert "generation_config.json: temperature: expected a number from 0 to 100, found -1" in message


def test_sliding_window_layers_must_match(tmp_path: Path) -> None:
    folder = make_model_dir("qwen2", tmp_path)
    edit_json(folder / "config.json", lambda config: config.update(layer_types=["full_attention"]))
    assert "layer_types: expected 3 of" in refusal(folder)


# --- weights: one file


def test_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4])
    message = refusal(folder)
    assert f"{path}: the file is truncated inside tensor" in message
    assert f"expected {size} bytes, found {size - 4}" in message


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 99_000_000])
def test_header_longer_than_the_file(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert f"{path}: not a whole safetensors file: header length {length} bytes" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\x02\x00\x00\x00\x00\x00\x00\x00{x"])
def test_file_that_is_no_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert str(folder / "model.safetensors") in refusal(folder)


def test_overlapping_tensors(folder: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        norm = header["model.norm.weight"]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = [norm[0] - 4, norm[1] - 4]

    edit_header(folder / "model.safetensors", overlap)
    message = refusal(folder)
    assert "'model.norm.weight'" in message
    assert "overlaps" in message


def test_bytes_that_belong_to_no_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"secret")
    assert "the rest belongs to no tensor" in refusal(folder)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F33"}, "dtype: expected one of"),
        ({"shape": [60, -1]}, "shape: expected a list of sizes, found [60, -1]"),
        ({"shape": [2**70]}, "data_offsets: expected"),
        ({"data_offsets": [8, 0]}, "data_offsets: expected two byte offsets in order, found [8, 0]"),
        ({"data_offsets": None}, "data_offsets: expected two byte offsets in order, found None"),
    ],
)
def test_bad_header_entry(folder: Path, entry: dict[str, object], words: str) -> None:
    edit_header(folder / "model.safetensors", lambda header: header["model.norm.weight"].update(entry))
    message = refusal(folder)
    assert f"{folder / 'model.safetensors'}: tensor 'model.norm.weight': " in message
    assert words in message


def test_name_given_twice(folder: Path) -> None:
    text = b'{"a": {}, "a": {}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "'a' is there twice" in refusal(folder)


def test_missing_tensor(folder: Path) -> None:
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    message = refusal(folder)
    assert "tensor 'model.layers.1.self_attn.k_proj.weight' is missing: expected [32, 60], found nothing" in message


def test_wrong_shape(folder: Path) -> None:
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"model.layers.2.mlp.down_proj.weight": torch.zeros(60, 99)}),
    )
    message = refusal(folder)
    assert "tensor 'model.layers.2.mlp.down_proj.weight': shape: expected [60, 100], found [60, 99]" in message


def test_wrong_dtype(folder: Path) -> None:
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(60, dtype=torch.int8)}),
    )
    assert "tensor 'model.norm.weight': dtype: expected one of BF16, F16, F32, F64, found I8" in refusal(folder)


def test_leftover_tensor(folder: Path) -> None:
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({"model.layers.3.extra": torch.zeros(2)}))
    assert "tensor 'model.layers.3.extra' [2] has no place in this model" in refusal(folder)


def test_harmless_leftover_is_ignored(folder: Path) -> None:
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}),
    )
    load_model(folder, device="cpu")


def test_tied_head_may_be_saved_too(tmp_path: Path) -> None:
    folder = make_model_dir("qwen3", tmp_path)
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    load_model(folder, device="cpu")


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_names_saved_without_the_head(family: str, tmp_path: Path) -> None:
    """GPT-2 on the hub was saved from the model without its head: its names lack the first part."""
    folder = make_model_dir(family, tmp_path)
    fingerprint = load_model(folder, device="cpu").fingerprint
    prefix = {"gpt2": "transformer.", "opt": "model."}[family]
    path = folder / "model.safetensors"
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert load_model(folder, device="cpu").fingerprint == fingerprint


def test_only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "expected model.safetensors, found only pytorch_model.bin" in message
    assert "never loaded" in message


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "found no weights" in refusal(folder)


# --- tokenizer, links, names


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert f"{folder}: no tokenizer" in refusal(folder)


def test_tokenizer_of_another_model(folder: Path) -> None:
    edit_json(
        folder / "tokenizer.json",
        lambda tokenizer: tokenizer["added_tokens"].append({"id": 5000, "content": "<x>", "special": True}),
    )
    assert "token id 5000: expected less than vocab_size 331" in refusal(folder)


def test_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    assert f"a link to {outside}, outside of the model folder" in refusal(folder)


def test_links_of_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    """The hub's cache keeps files under blobs/ and links to them from snapshots/<revision>/."""
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / "abc", tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    load_model(snapshot, device="cpu")


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c"])
def test_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigurationError, match="no such folder"):
        load_model(name)


def test_file_instead_of_a_folder(folder: Path) -> None:
    assert "expected a model folder, found a file" in refusal(folder / "config.json")


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match="hub cannot be reached"):
        load_model("some-org/some-model")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("dtype", "int4", "dtype: expected auto, float32"), ("device", "tpu", "device: expected auto, cpu or cuda")],
)
def test_unknown_dtype_or_device(pristine: Path, option: str, value: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        load_model(pristine, **{"device": "cpu", option: value})
