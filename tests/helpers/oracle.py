"""A tiny model in two programs: the engine, and transformers as its oracle."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.tiny_models import FAMILIES, VOCAB_SIZE, make_model_dir

from baton.services.engine.engine import Engine
from baton.services.engine.loader import LoadedModel, load_model

NUM_BLOCKS = 200
NUM_OUTPUT_TOKENS = 24


@dataclass(frozen=True)
class Subject:
    """Shared by all tests of a session: nobody changes it. The engine's is on the GPU where there is one."""

    family: str
    path: Path
    loaded: LoadedModel
    reference: Any  # the transformers model, float32

    def engine(self) -> Engine:
        return Engine(self.loaded, num_blocks=NUM_BLOCKS)


def make_subject(family: str, path: Path, **overrides: Any) -> Subject:
    import transformers

    make_model_dir(family, path, **overrides)
    reference = getattr(transformers, FAMILIES[family][1]).from_pretrained(path, dtype=torch.float32).eval()
    return Subject(family, path, load_model(path, dtype="float32", device="auto"), reference)


@functools.cache
def expected_tokens(subject: Subject, prompt: tuple[int, ...]) -> list[int]:
    """What transformers' greedy ``generate`` adds to the prompt: NUM_OUTPUT_TOKENS tokens."""
    from transformers import GenerationConfig

    greedy = GenerationConfig(max_new_tokens=NUM_OUTPUT_TOKENS, do_sample=False, pad_token_id=0)
    subject.reference.generation_config.eos_token_id = None  # go on, whatever comes
    ids = torch.tensor([prompt])
    out = subject.reference.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def make_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens; the same length and seed give the same prompt."""
    rng = random.Random(f"{length}/{seed}")
    return tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length))
