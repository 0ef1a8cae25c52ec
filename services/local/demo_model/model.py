"""The demo model's shape, and the folder that it is stored in."""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from baton.services.local.demo_model.tokenizer import END, MAX_POSITIONS, save_tokenizer

LAYERS = 3
HIDDEN = 256


def build_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """A model of the demo's shape with random weights, in float32."""
    return Qwen3ForCausalLM(Qwen3Config(attn_implementation="sdpa", **_shape(tokenizer))).float()


def export(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a Hugging Face model folder; weights are stored as bfloat16, half the size, and computed with in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict()
    del tensors["lm_head.weight"]  # tied to the embedding
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors keeps it to its owner
    shape = _shape(tokenizer)
    ends = {name: shape[name] for name in ("eos_token_id", "pad_token_id")}
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "float32", **shape}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"do_sample": False, **ends})
    save_tokenizer(tokenizer, folder)
    with as_file(files(__package__) / "chat_template.jinja") as template:
        if template.parent.resolve() != folder.resolve():
            shutil.copyfile(template, folder / "chat_template.jinja")


def _shape(tokenizer: Tokenizer) -> dict[str, Any]:
    end = tokenizer.token_to_id(END)
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
