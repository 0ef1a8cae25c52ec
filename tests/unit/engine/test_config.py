"""What config.json and generation_config.json become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.oracle import Subject
from helpers.tiny_models import make_model_dir

from baton.services.engine.config import RopeConfig, read_generation_defaults
from baton.services.engine.dtypes import cpu_has_fast_bfloat16, resolve_dtype
from baton.services.engine.layers import rope_inv_freq
from baton.services.engine.loader import load_model
from baton.services.engine.models.registry import read_model_config


def test_llama_shape(llama: Subject) -> None:
    config = llama.loaded.config
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size) == (6, 2, 16, 60)
    assert (config.vocab_size, config.num_layers, config.tie_word_embeddings) == (331, 3, False)
    assert config.sliding_windows == (None, None, None)
    assert config.eos_token_ids == {2}
    assert config.rope == RopeConfig(10000.0, "llama3", 8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    ("family", "windows"),
    [("mistral", (24, 24, 24)), ("qwen2", (None, 24, 24)), ("qwen3", (None, None, None))],
)
def test_windows(family: str, windows: tuple[int | None, ...], get_subject: Callable[[str], Subject]) -> None:
    assert get_subject(family).loaded.config.sliding_windows == windows


def test_windows_from_a_first_layer(tmp_path: Path) -> None:
    """Qwen's older configs name the first layer with a window instead of each layer."""
    folder = make_model_dir("qwen2", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values.update(layer_types=None, max_window_layers=2)
    (folder / "config.json").write_text(json.dumps(values))
    assert read_model_config(folder)[1].sliding_windows == (None, None, 24)


def test_switches_of_the_families(get_subject: Callable[[str], Subject]) -> None:
    configs = {name: get_subject(name).loaded.config for name in ("llama-biased", "qwen2", "qwen3", "opt-post-norm")}
    assert (configs["llama-biased"].qkv_bias, configs["llama-biased"].mlp_bias) == (True, True)
    assert (configs["qwen2"].qkv_bias, configs["qwen2"].attention_output_bias) == (True, False)
    assert configs["qwen3"].qk_norm
    opt = configs["opt-post-norm"]
    assert (opt.norm_first, opt.final_norm, opt.embedding_size) == (False, False, 28)


def test_gpt2_attention_scales(tmp_path: Path) -> None:
    folder = make_model_dir("gpt2", tmp_path, scale_attn_by_inverse_layer_idx=True)
    scales = read_model_config(folder)[1].attention_scales
    assert scales == pytest.approx([12**-0.5, 12**-0.5 / 2, 12**-0.5 / 3])


def test_generation_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path).temperature is None
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [7, 2, 99999]}'
    )
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.9, 20)
    assert (defaults.repetition_penalty, defaults.min_p) == (1.05, None)
    assert defaults.eos_token_ids == (7, 2, 99999)


def test_generation_config_decides_the_ending_tokens(tmp_path: Path) -> None:
    """As in transformers; ids that the vocabulary does not have are dropped."""
    folder = make_model_dir("llama", tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5, 99999]}')
    assert read_model_config(folder)[1].eos_token_ids == {5, 7}


def test_fingerprint_tells_models_apart(llama: Subject, tmp_path: Path) -> None:
    """Another weight or another number in the config: another model. The format it is run in: not."""
    assert len(llama.loaded.fingerprint) == 32
    assert load_model(llama.path, dtype="bfloat16", device="cpu").fingerprint == llama.loaded.fingerprint
    other_weights = make_model_dir("llama", tmp_path / "weights", seed=1)
    other_config = make_model_dir("llama", tmp_path / "config", rms_norm_eps=1e-4)
    fingerprints = {load_model(path, device="cpu").fingerprint for path in (llama.path, other_weights, other_config)}
    assert len(fingerprints) == 3


def test_auto_dtype() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    fast = torch.bfloat16 if cpu_has_fast_bfloat16() else torch.float32
    assert resolve_dtype("auto", "bfloat16", cpu) is fast
    assert resolve_dtype("auto", "float16", cpu) is torch.float32
    assert resolve_dtype("auto", "bfloat16", cuda) is torch.bfloat16
    assert resolve_dtype("auto", "float16", cuda) is torch.float16
    assert resolve_dtype("auto", None, cuda) is torch.float32
    assert resolve_dtype("bfloat16", "float32", cpu) is torch.bfloat16


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (RopeConfig(500.0), {"rope_type": "default"}),
        (RopeConfig(500.0, "linear", 3.0), {"rope_type": "linear", "factor": 3.0}),
        (
            RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_rotation_frequencies_are_those_of_transformers(rope: RopeConfig, parameters: dict[str, object]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_parameters={"rope_theta": rope.theta, **parameters}
    )
    theirs = LlamaRotaryEmbedding(config).inv_freq
    ours = rope_inv_freq(rope, 128)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
