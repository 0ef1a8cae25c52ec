"""The cache's layout: what lies where, and that a block carries everything another worker needs."""

from __future__ import annotations

import mmap

import pytest
import torch
from helpers.engine_driver import Driver, make_request
from helpers.oracle import NUM_OUTPUT_TOKENS, Subject, expected_tokens, make_prompt

from baton.services.core.errors import ConfigurationError
from baton.services.engine.engine import Engine
from baton.services.engine.kv_cache import KVCache, KVCacheShape

SHAPE = KVCacheShape(num_layers=3, num_kv_heads=2, head_dim=16, block_size=16, dtype=torch.bfloat16)


def test_a_block_is_one_run_of_bytes() -> None:
    cache = KVCache(SHAPE, 5, device=torch.device("cpu"))
    assert SHAPE.block_bytes == 3 * 2 * 16 * 2 * 16 * 2
    assert cache.tensor.is_contiguous()
    assert cache.tensor[3].data_ptr() - cache.tensor.data_ptr() == 3 * SHAPE.block_bytes
    k, v = cache.layers[1]
    assert k.shape == v.shape == (5, 16, 2, 16)
    k[2, 7, 1, 3], v[2, 7, 1, 3] = 5.0, 6.0
    assert cache.tensor[2, 1, :, 7, 1, 3].tolist() == [5.0, 6.0]


def test_facts_for_peers() -> None:
    assert (SHAPE.dtype_name, SHAPE.order) == ("bfloat16", "layer,kv,token,head,dim")


def test_blocks_from_bytes() -> None:
    assert SHAPE.num_blocks_in(10 * SHAPE.block_bytes + 1) == 10
    with pytest.raises(ConfigurationError, match=f"hold no block of {SHAPE.block_bytes} bytes"):
        SHAPE.num_blocks_in(SHAPE.block_bytes - 1)


def test_laid_in_memory_that_others_map(llama: Subject) -> None:
    """What the engine computes is in the given bytes, and nowhere else."""
    num_bytes = 40 * Engine(llama.loaded, num_blocks=1).shape.block_bytes
    with mmap.mmap(-1, num_bytes + 100) as mapping:
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
        engine = Engine(llama.loaded, num_blocks=40, memory=memory)
        driver = Driver(engine)
        request = make_request(make_prompt(17), max_tokens=4)
        driver.run([request])
        block_bytes = engine.shape.block_bytes
        for block in range(40):
            content = mapping[block * block_bytes : (block + 1) * block_bytes]
            assert any(content) == (block in request.block_table)
        assert not any(mapping[num_bytes:])
        del memory, engine, driver


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (torch.zeros(10, dtype=torch.uint8), "10 bytes on cpu, need 12288"),
        (torch.zeros(12288, dtype=torch.int8), "must be contiguous uint8"),
        (torch.zeros(24576, dtype=torch.uint8)[::2], "must be contiguous uint8"),
    ],
)
def test_unfit_memory(memory: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KVCache(SHAPE, 2, device=torch.device("cpu"), memory=memory)


def test_contents_are_transformers_keys_and_values(llama: Subject) -> None:
    """Keys after rotation, values as projected, token by token along the block table."""
    prompt = make_prompt(37)
    driver = Driver(llama.engine())
    request = make_request(prompt, max_tokens=1)
    driver.run([request], chunk_size=10)
    with torch.no_grad():
        reference = llama.reference(torch.tensor([prompt]), use_cache=True).past_key_values
    for layer in range(llama.loaded.config.num_layers):
        for index, expected in enumerate((reference.layers[layer].keys, reference.layers[layer].values)):
            ours = driver.engine.kv_cache[request.block_table, layer, index].flatten(0, 1)[:37]
            torch.testing.assert_close(ours, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [15, 16, 17, 130])
def test_prompt_on_one_engine_decoding_on_another(llama: Subject, length: int) -> None:
    """The handoff, without the transport: copy the blocks' bytes, pass the first token, go on."""
    prompt = make_prompt(length)
    prefill, decode = Driver(llama.engine()), Driver(llama.engine())
    first = make_request(prompt, max_tokens=1)
    prefill.run([first])
    second = make_request([*prompt, first.token_ids[-1]], num_prompt_tokens=length, max_tokens=NUM_OUTPUT_TOKENS)
    decode.free_blocks.reverse()
    decode.allocate(second, length)
    assert second.block_table != first.block_table
    for source, target in zip(first.block_table, second.block_table, strict=True):
        payload = prefill.engine.kv_cache[source].view(torch.uint8).numpy().tobytes()
        decode.engine.kv_cache[target].view(torch.uint8).copy_(
            torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(
                decode.engine.kv_cache[target].view(torch.uint8).shape
            )
        )
    second.num_computed_tokens = length
    decode.run([second])
    assert decode.output(second) == expected_tokens(llama, prompt)
