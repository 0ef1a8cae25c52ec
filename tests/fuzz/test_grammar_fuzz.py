"""Hostile schemas, expressions and grammars: each is answered, harms nobody, and what is let through harms no worker.

``make fuzz GRAMMARS=10000`` for longer; it prints the slowest answers and the memory beside their limits.
"""

from __future__ import annotations

import os
import random
import resource
import time
from collections import Counter

import numpy as np
from helpers import tiny_tokenizers
from helpers.gateway_api import MODEL, chat_body, make_gateway
from helpers.hostile_grammars import hostile_fields

from baton.services.engine.grammar import GrammarCompiler
from baton.services.gateway.grammar_helper import CPU_S, MEMORY_BYTES
from baton.services.gateway.tokenizer import ModelTokenizer

NUM_GRAMMARS = int(os.environ.get("BATON_FUZZ_GRAMMARS", "30"))
SEED = int(os.environ.get("BATON_FUZZ_SEED", "1"))
NUM_TOKENS = 30
# More than the verdicts that are remembered take, and what a test process grows by anyway.
MAX_GROWTH_MB = 150


def resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def draw_tokens(compiler: GrammarCompiler, grammar: str, ends: frozenset[int], vocab_size: int, seed: int) -> float:
    """What a worker does with a grammar, in this process; the slowest mask in seconds."""
    rng, slowest = random.Random(seed), 0.0
    matcher = compiler.submit(lambda: compiler.shared(grammar, ends)).result(60).deep_copy()
    bits = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    for _ in range(NUM_TOKENS):
        start_s = time.perf_counter()
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        slowest = max(slowest, time.perf_counter() - start_s)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        if matcher.is_error() or not len(allowed):
            break  # told to the client as the end of its request
        token_id = int(rng.choice(allowed))
        if token_id in ends or not matcher.consume_token(token_id):
            break
    return slowest


async def test_every_hostile_grammar_is_answered_and_none_harms_a_worker() -> None:
    template = tiny_tokenizers.CHAT_TEMPLATE + "{# <tool_call> #}"
    gateway = make_gateway(tokenizer=ModelTokenizer(tiny_tokenizers.as_transformers(chat_template=template)))
    model = gateway.deps.model
    compiler = GrammarCompiler(gateway.deps.tokenizer.as_json, model.vocab_size)
    answers: Counter[int] = Counter()
    slowest: list[tuple[float, int]] = []
    slowest_mask, before_mb = 0.0, 0.0
    async with gateway.client() as client:
        assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 200
        for number in range(NUM_GRAMMARS):
            seed = SEED * 1_000_000 + number
            fields = hostile_fields(seed)
            num_known = len(gateway.dispatcher.requests)
            start_s = time.perf_counter()
            response = await client.post("/v1/chat/completions", json=chat_body(max_tokens=4) | fields, timeout=60)
            slowest = sorted([*slowest, (time.perf_counter() - start_s, seed)])[-3:]
            answers[response.status_code] += 1
            assert response.status_code in (200, 400), (seed, response.text)
            if response.status_code == 400:
                error = response.json()["error"]
                assert error["param"], seed
                assert len(error["message"]) <= 1000, seed
                assert len(gateway.dispatcher.requests) == num_known, seed
            elif (grammar := gateway.dispatcher.requests[-1].sampling.grammar) is not None:
                mask_s = draw_tokens(compiler, grammar, model.eos_token_ids, model.vocab_size, seed)
                slowest_mask = max(slowest_mask, mask_s)
            gateway.dispatcher.requests.clear()
            if number == min(50, NUM_GRAMMARS // 2):
                before_mb = resident_mb()
            if number % 1000 == 999:
                print(f"\n{number + 1}: {slowest[-1][0]:.3f} s, {resident_mb():.0f} MiB", flush=True)
        body = {"model": MODEL, "prompt": "x", "structured_outputs": {"regex": "[0-9]{1,9}"}}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    grown_mb = resident_mb() - before_mb
    compiler.close()
    gateway.deps.grammars.close()
    child_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"\n{NUM_GRAMMARS} hostile grammars: {answers[200]} used, {answers[400]} refused")
    print(f"slowest answers: {', '.join(f'{s:.3f} s (seed {seed})' for s, seed in reversed(slowest))}; limit 1 s")
    print(f"slowest mask {slowest_mask * 1e3:.1f} ms; this process grew by {grown_mb:.0f} MiB, limit {MAX_GROWTH_MB}")
    print(
        f"largest child {child_mb:.0f} MiB; it may have {CPU_S:g} s and {MEMORY_BYTES >> 20} MiB beside what it began with"
    )
    assert grown_mb < MAX_GROWTH_MB
    assert answers[400] > NUM_GRAMMARS // 10
    assert answers[200] > NUM_GRAMMARS // 10
