"""Small random models of every family, in deliberately awkward shapes, saved as a Hugging Face folder.

The weights are drawn so that attention is sharp and every bias, norm and position matters: with transformers' own small
initial values a model hardly looks at its context, and a KV cache that arrived wrong would give the right tokens.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 331  # odd on purpose
EOS_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_ROTARY: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}

# name -> (config class, model class, config). "llama" and "llama-biased" and so on are one family each in two shapes.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_ROTARY, "head_dim": 16, "rope_parameters": _LLAMA3_ROPE}),
    "llama-biased": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            **_ROTARY,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
        },
    ),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            **_ROTARY,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_ROTARY, "head_dim": 24, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_ROTARY, "head_dim": 16, "sliding_window": 24}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 60,
            "ffn_dim": 100,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "max_position_embeddings": 1024,
            "word_embed_proj_dim": 60,
        },
    ),
    "opt-post-norm": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 60,
            "ffn_dim": 100,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "max_position_embeddings": 1024,
            "word_embed_proj_dim": 28,
            "do_layer_norm_before": False,
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 60, "n_layer": 3, "n_head": 5, "n_positions": 1024}),
}


def make_model_dir(
    family: str, path: Path, *, seed: int = 0, tokenizer: bool = True, max_shard_size: str = "1GB", **overrides: Any
) -> Path:
    """Write a model of ``family`` (a key of FAMILIES) to ``path``; ``overrides`` go to its config."""
    import transformers

    config_name, model_name, fields = FAMILIES[family]
    special = {"bos_token_id": 1, "eos_token_id": EOS_TOKEN_ID, "pad_token_id": 0}
    config = getattr(transformers, config_name)(**{"vocab_size": VOCAB_SIZE, **special, **fields, **overrides})
    model = getattr(transformers, model_name)(config)
    _randomize(model, seed)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        write_tokenizer(path)
    return path


def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.1 * noise + ("norm" in name or "ln_" in name) * (not name.endswith("bias")))
            elif "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(2.0 * noise / parameter.shape[-1] ** 0.5)


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer with a chat template, small enough for VOCAB_SIZE."""
    (path / "tokenizer.json").write_text(_tokenizer_json())
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
            }
        )
    )


@functools.cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 10,
        special_tokens=["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the code for the door is here, what is the code for the door", "a relay race: the baton is handed over"]
    tokenizer.train_from_iterator(text, trainer)
    serialized: str = tokenizer.to_str()
    return serialized
