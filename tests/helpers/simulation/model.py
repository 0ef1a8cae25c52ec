"""The simulated model: its KV cache holds tags, its next token is a hash over every tag that it reads.

The tag of a token is a hash over its request's salt and all tokens up to it. So a block that holds anything but the right
prefix, half of it, or an older life of it, makes the next token wrong, and whoever knows prompt and seed knows the right one:
``expected_tokens`` is the whole model as a pure function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from baton.kvtransfer.memory import NUM_CANARY_BLOCKS
from baton.kvtransfer.rows import Rows
from baton.services.core.request import SampledToken, SamplingParams
from baton.services.core.scheduler.base import ScheduledRequest, StepResult
from baton.services.engine.config import ModelConfig
from baton.services.engine.grammar import GrammarCompiler
from baton.services.engine.loader import LoadedModel

VOCABULARY = 64
EOS = 0
BLOCK_SIZE = 4
TAG_BYTES = 16
BLOCK_BYTES = BLOCK_SIZE * TAG_BYTES
MAX_MODEL_LEN = 80

# One layer, one head, two float32 a token for K and V: 16 bytes.
CONFIG = ModelConfig("sim", 1, 2, 1, 1, 2, 2, VOCABULARY, MAX_MODEL_LEN, 1e-5, "silu", True, (None,), (1.0,))
LOADED = LoadedModel(CONFIG, None, torch.float32, torch.device("cpu"), Path(), "0" * 32)  # type: ignore[arg-type]


def _root(salt: str) -> bytes:
    return hashlib.blake2b(salt.encode(), digest_size=TAG_BYTES).digest()


def _next_tag(tag: bytes, token: int) -> bytes:
    return hashlib.blake2b(tag + token.to_bytes(4, "little"), digest_size=TAG_BYTES).digest()


def _draw(tags: bytes, sampling: SamplingParams, num_output: int) -> int:
    """The next token after everything that ``tags`` stand for."""
    key = b"" if sampling.is_greedy else sampling.seed.to_bytes(8, "little")
    number = int.from_bytes(hashlib.blake2b(tags, digest_size=8, key=key).digest(), "little")
    token = number % VOCABULARY
    while num_output < sampling.min_tokens and token in sampling.ending_token_ids:
        token = (token + 1) % VOCABULARY
    return token


def expected_tokens(prompt: Sequence[int], sampling: SamplingParams, salt: str) -> tuple[list[int], str]:
    """What any undisturbed run generates, and why it ends."""
    tag = _root(salt)
    tags = bytearray()
    for token in prompt:
        tag = _next_tag(tag, token)
        tags += tag
    output: list[int] = []
    while True:
        token = _draw(bytes(tags), sampling, len(output))
        output.append(token)
        if token in sampling.ending_token_ids and len(output) >= sampling.min_tokens:
            return output, "stop"
        if len(output) >= sampling.max_tokens or len(prompt) + len(output) >= MAX_MODEL_LEN:
            return output, "length"
        tag = _next_tag(tag, token)
        tags += tag


class SimMemory:
    """The bytes of a block pool. Nobody can map them: blocks travel over the data plane's connections."""

    is_staged = False
    shared = None

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = BLOCK_BYTES
        num_rows = num_blocks + NUM_CANARY_BLOCKS
        self.rows = Rows(bytearray(b"\xee") * (num_rows * BLOCK_BYTES), num_rows, BLOCK_BYTES)

    @property
    def max_rows(self) -> int:
        return self.num_blocks

    async def load(self, block_ids: Sequence[int]) -> list[int]:
        return list(block_ids)

    def unload(self, rows: Sequence[int]) -> None:
        pass

    async def claim(self, block_ids: Sequence[int]) -> list[int]:
        return list(block_ids)

    def try_claim(self, block_ids: Sequence[int]) -> list[int] | None:
        return list(block_ids)

    def store(self, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        pass

    def unclaim(self, rows: Sequence[int]) -> None:
        pass

    def canary_row(self, number: int) -> int:
        return self.num_blocks + number

    def close(self) -> None:
        pass


@dataclass
class SimEngine:
    """Computes over ``memory``. ``slowness`` multiplies what a step takes; ``failures`` steps raise; ``hangs`` for ever."""

    memory: SimMemory
    step_s: float
    token_s: float
    slowness: float = 1.0
    failures: int = 0
    hangs: bool = False
    poison: set[int] = field(default_factory=set)  # a prompt with one of these tokens kills the process
    num_steps: int = 0
    problems: list[str] = field(default_factory=list)  # of the order in which things had their turns
    on_poison: Any = None
    grammars: GrammarCompiler = field(default_factory=lambda: GrammarCompiler(str, 0))  # nobody asks for one here

    def cost_s(self, batch: Sequence[ScheduledRequest]) -> float:
        num_tokens = sum(item.num_tokens for item in batch)
        return (self.step_s + self.token_s * num_tokens) * self.slowness

    def step(self, batch: Sequence[ScheduledRequest]) -> StepResult:
        self.num_steps += 1
        if self.failures:
            self.failures -= 1
            raise RuntimeError("simulated out of memory")
        sampled: dict[str, SampledToken] = {}
        for item in batch:
            self._compute(item)
            if item.samples:
                sampled[item.request.request_id] = SampledToken(self._sample(item))
        return StepResult(sampled)

    def _read(self, item: ScheduledRequest, num_tokens: int) -> bytearray:
        rows, table = self.memory.rows, item.request.block_table
        tags = bytearray()
        for index in range(-(-num_tokens // BLOCK_SIZE)):
            tags += rows.row(table[index])
        del tags[num_tokens * TAG_BYTES :]
        return tags

    def _compute(self, item: ScheduledRequest) -> None:
        request, rows = item.request, self.memory.rows
        start = request.num_computed_tokens
        if start:
            block, offset = divmod(start - 1, BLOCK_SIZE)
            tag = bytes(rows.row(request.block_table[block])[offset * TAG_BYTES : (offset + 1) * TAG_BYTES])
        else:
            tag = _root(request.cache_salt)
        for position in range(start, start + item.num_tokens):
            tag = _next_tag(tag, request.token_ids[position])
            block, offset = divmod(position, BLOCK_SIZE)
            rows.row(request.block_table[block])[offset * TAG_BYTES : (offset + 1) * TAG_BYTES] = tag

    def _sample(self, item: ScheduledRequest) -> int:
        request = item.request
        return _draw(bytes(self._read(item, request.num_tokens)), request.sampling, request.num_output_tokens)
