"""Prefill and decode speed of the engine on the 135M-parameter Llama shape in bfloat16, random weights."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

from baton.load.limits import matmul_flops_per_s, memory_read_gb_per_s
from baton.load.report import Row, median_row
from baton.services.core.request import Request, SamplingParams
from baton.services.core.scheduler.base import ScheduledRequest
from baton.services.engine.engine import Engine
from baton.services.engine.loader import LoadedModel, load_model

# SmolLM2-135M's configuration.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BLOCK_SIZE = 16


def make_model_folder(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The configuration with random weights, as a model folder without a tokenizer."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return values.to(dtype)

    hidden, kv = CONFIG["hidden_size"], 3 * 64
    weights = {"model.embed_tokens.weight": noise(49152, 576), "model.norm.weight": torch.ones(576, dtype=dtype)}
    for layer in range(30):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}self_attn.q_proj.weight": noise(576, 576),
            f"{prefix}self_attn.k_proj.weight": noise(kv, 576),
            f"{prefix}self_attn.v_proj.weight": noise(kv, 576),
            f"{prefix}self_attn.o_proj.weight": noise(576, 576),
            f"{prefix}mlp.gate_proj.weight": noise(1536, 576),
            f"{prefix}mlp.up_proj.weight": noise(1536, 576),
            f"{prefix}mlp.down_proj.weight": noise(576, 1536),
            f"{prefix}input_layernorm.weight": torch.ones(576, dtype=dtype),
            f"{prefix}post_attention_layernorm.weight": torch.ones(576, dtype=dtype),
        }
    assert hidden == 576
    save_file(weights, folder / "model.safetensors")
    return folder


def write_tokenizer(folder: Path) -> None:
    """One word for each id, so that every token that a random model draws is text in a stream."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(49152)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def num_parameters() -> tuple[int, int]:
    """(weights that every token is multiplied with, those of the output layer, which only sampled tokens need)."""
    per_layer = 576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536
    return 30 * per_layer, 49152 * 576


def bench_engine(repeats: int = 2) -> list[Row]:
    """Prefill 1 x 2048 and 4 x 512; decode 1 and 16 sequences of 128 to 152 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_model(make_model_folder(Path(folder)), dtype="bfloat16", device="cpu", require_tokenizer=False)
    flops: list[float] = []
    bandwidth: list[float] = []
    speeds: dict[str, list[float]] = {"1x2048": [], "4x512": [], "1": [], "16": []}
    for _ in range(repeats):
        flops.append(matmul_flops_per_s())
        bandwidth.append(memory_read_gb_per_s())
        speeds["1x2048"].append(_prefill(loaded, 1, 2048))
        speeds["4x512"].append(_prefill(loaded, 4, 512))
        speeds["1"].append(_decode(loaded, 1))
        speeds["16"].append(_decode(loaded, 16))
    body, head = num_parameters()
    rows = []
    for name, length in (("1x2048", 2048), ("4x512", 512)):
        # Causal attention multiplies with half of the context on average, once for scores and once for values.
        per_token = 2 * body + 2 * 30 * length * 9 * 64
        limits = [rate / per_token for rate in flops]
        rows.append(median_row(f"prefill {name}, bf16", "tok/s", speeds[name], "matmul peak gives", limits))
    kv_bytes = 30 * 2 * 3 * 64 * 2
    for name in ("1", "16"):
        batch = int(name)
        by_memory = [rate * 1e9 / (2 * (body + head) + batch * 140 * kv_bytes) * batch for rate in bandwidth]
        by_compute = [rate / (2 * (body + head)) for rate in flops]
        limits = [min(pair) for pair in zip(by_memory, by_compute, strict=True)]
        rows.append(median_row(f"decode batch {name}, bf16", "tok/s", speeds[name], "memory and matmul give", limits))
    return rows


def _requests(count: int, num_tokens: int, max_tokens: int) -> list[Request]:
    num_blocks = -(-(num_tokens + max_tokens) // BLOCK_SIZE)
    requests = []
    for index in range(count):
        token_ids = [(7 * position + 13 * index) % 49000 + 1 for position in range(num_tokens)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = Request(f"r{index}", 1, token_ids, num_tokens, params)
        request.block_table = list(range(index * num_blocks, (index + 1) * num_blocks))
        requests.append(request)
    return requests


def _engine(loaded: LoadedModel, requests: list[Request]) -> Engine:
    return Engine(loaded, num_blocks=sum(len(request.block_table) for request in requests), block_size=BLOCK_SIZE)


def _prefill(loaded: LoadedModel, count: int, num_tokens: int) -> float:
    requests = _requests(count, num_tokens, 1)
    engine = _engine(loaded, requests)
    begin = time.perf_counter()
    engine.step([ScheduledRequest(request, num_tokens) for request in requests])
    return count * num_tokens / (time.perf_counter() - begin)


def _decode(loaded: LoadedModel, count: int, num_tokens: int = 128, num_steps: int = 24) -> float:
    requests = _requests(count, num_tokens, num_steps)
    engine = _engine(loaded, requests)
    result = engine.step([ScheduledRequest(request, num_tokens) for request in requests])
    begin = 0.0
    for step in range(num_steps - 1):
        for request in requests:
            request.num_computed_tokens = request.num_tokens
            request.token_ids.append(result.sampled[request.request_id].token_id)
        if step == 1:
            begin = time.perf_counter()  # the first step warms up
        result = engine.step([ScheduledRequest(request, 1) for request in requests])
    return count * (num_steps - 2) / (time.perf_counter() - begin)
