"""The weights that training starts from: random, but with the wiring of induction heads laid out.

Left to chance, a model of this size had not found the circuit that looks a token up by those before it (Olsson et al.,
"In-context Learning and Induction Heads", 2022) after 2.9 million tokens, three times what the whole training takes now.
Here the first layer starts with heads that look one, two and three tokens back and note a sketch of what they see in
dimensions that embeddings leave free; the next two layers start with heads that look for the place whose notes fit the
current tokens, and copy the token found there. Training does the rest: what to look up, exactly, over long prompts, and when.
"""

from __future__ import annotations

import torch
from transformers import Qwen3ForCausalLM

CONSTANT = 0  # the dimension that is the same for every token: what position-only heads read
EMBEDDED = slice(1, 160)
NOTES = (slice(160, 192), slice(192, 224), slice(224, 256))  # sketches of the tokens one, two and three back
SKETCH = 32

_EMBEDDING_STD = 0.25
_CONSTANT_VALUE = 1.25
_NOISE_STD = 0.02
_FINAL_SCALE = 0.15


@torch.no_grad()
def lay_out(model: Qwen3ForCausalLM, generator: torch.Generator) -> None:
    """Overwrites all weights of a model of 3 or more layers, hidden size 256 and 4 query heads on 2 key heads of 64."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, _NOISE_STD, generator=generator)
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, _EMBEDDING_STD, generator=generator)
    embedding[:, CONSTANT] = _CONSTANT_VALUE
    embedding[:, EMBEDDED.stop :] = 0
    model.model.norm.weight.fill_(_FINAL_SCALE)
    sketch = torch.linalg.qr(torch.randn(EMBEDDED.stop - 1, SKETCH, generator=generator)).Q.T
    for head, back in ((0, 1), (1, 2), (2, 3)):
        _look_back(model, head, back, sketch)
    _look_up(model, layer=1, head=0, query=(EMBEDDED, sketch), notes=NOTES[0], generator=generator)
    _look_up(model, layer=1, head=2, query=(NOTES[0], torch.eye(SKETCH)), notes=NOTES[1], generator=generator)
    _look_up(model, layer=2, head=0, query=(NOTES[1], torch.eye(SKETCH)), notes=NOTES[2], generator=generator)


def _look_back(model: Qwen3ForCausalLM, head: int, back: int, sketch: torch.Tensor) -> None:
    """First layer: query head `head` attends `back` tokens back, and notes a sketch of that token."""
    attention = model.model.layers[0].self_attn
    dim = attention.head_dim
    key_head = head // attention.num_key_value_groups
    frequencies = model.model.rotary_emb.inv_freq
    fast = (frequencies > 0.05).float()
    # Rotary embedding makes query i meet key j as the sum of cos(frequency * (i - j - back)) over the fast frequencies.
    key = torch.cat([fast, torch.zeros_like(fast)])
    query = torch.cat([fast * (frequencies * back).cos(), -fast * (frequencies * back).sin()])
    attention.k_proj.weight[key_head * dim : (key_head + 1) * dim, CONSTANT] = 0.8 * key
    attention.q_proj.weight[head * dim : (head + 1) * dim, CONSTANT] = 0.8 * query
    value = attention.v_proj.weight[key_head * dim : (key_head + 1) * dim]
    value[:SKETCH, EMBEDDED] = sketch
    output = attention.o_proj.weight[:, head * dim : (head + 1) * dim]
    output[NOTES[back - 1], :SKETCH] = 0.4 * torch.eye(SKETCH)
    attention.q_norm.weight.fill_(1.5)


def _look_up(
    model: Qwen3ForCausalLM,
    layer: int,
    head: int,
    query: tuple[slice, torch.Tensor],
    notes: slice,
    generator: torch.Generator,
) -> None:
    """Query head `head` of `layer` attends where `notes` fit what `query` (dimensions, map to a sketch) gives, and copies."""
    attention = model.model.layers[layer].self_attn
    dim = attention.head_dim
    key_head = head // attention.num_key_value_groups
    # Only the slow half of the frequencies keeps its phase over a long prompt.
    slow = torch.cat([torch.arange(dim // 4, dim // 2), torch.arange(3 * dim // 4, dim)])
    source, to_sketch = query
    attention.q_proj.weight[head * dim + slow, source] = to_sketch
    attention.k_proj.weight[key_head * dim + slow, notes] = torch.eye(SKETCH)
    attention.q_norm.weight.fill_(1.5)
    copied = torch.linalg.qr(torch.randn(EMBEDDED.stop - 1, dim, generator=generator)).Q
    attention.v_proj.weight[key_head * dim : (key_head + 1) * dim, EMBEDDED] = copied.T
    attention.o_proj.weight[EMBEDDED, head * dim : (head + 1) * dim] = 0.5 * copied
