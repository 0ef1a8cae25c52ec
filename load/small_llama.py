"""A Llama of about four million parameters with random weights: small enough that two cores serve several requests a second,
large enough that computing is most of what a step takes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from baton.services.local.demo_model.words import ADJECTIVES, NOUNS

HIDDEN, LAYERS, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 256, 4, 768, 4, 2, 4096

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def make_small_llama(folder: Path) -> Path:
    """Writes it into ``folder``, with a tokenizer of one word for each id; those that ``baton bench`` sends are among them."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return values

    kv = KV_HEADS * HIDDEN // HEADS
    weights = {"model.embed_tokens.weight": noise(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}self_attn.q_proj.weight": noise(HIDDEN, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": noise(kv, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": noise(kv, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": noise(HIDDEN, HIDDEN),
            f"{prefix}mlp.gate_proj.weight": noise(INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.up_proj.weight": noise(INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.down_proj.weight": noise(HIDDEN, INTERMEDIATE),
            f"{prefix}input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
    save_file(weights, folder / "model.safetensors")
    known = dict.fromkeys((*ADJECTIVES, *NOUNS))
    words = [*known, *(f"w{index}" for index in range(VOCABULARY - len(known)))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
