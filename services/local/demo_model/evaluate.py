"""Examines a model folder: `python -m baton.services.local.demo_model.evaluate [--model DIR]`.

Fresh look-ups through the chat template, greedy, in float32; right means that the whole answer is right, to the character.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.services.local.demo_model import demo_model_path
from baton.services.local.demo_model.data import Lookup, make_lookup

BUCKETS = ((50, 150), (150, 400), (400, 800), (800, 1500))  # prompt tokens
_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Outcome:
    """One examined look-up."""

    lookup: Lookup
    bucket: tuple[int, int]
    prompt_tokens: int
    answer: str

    @property
    def right(self) -> bool:
        return self.answer == self.lookup.answer


def examine(folder: Path, count: int, seed: int) -> Iterator[Outcome]:
    """`count` look-ups, spread evenly over the buckets; a seed names the same questions for every model with this tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for index in range(count):
        bucket = BUCKETS[index % len(BUCKETS)]
        rng = random.Random(f"examination {seed}:{index}")  # noqa: S311 - questions, not a secret
        low, high = bucket
        prompt: list[int] = []
        while not low <= len(prompt) <= high:
            lookup = make_lookup(rng, rng.randint(low, high), lambda text: len(tokenizer(text).input_ids) + 1)
            prompt = tokenizer.apply_chat_template(list(lookup.messages), add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=_ANSWER_TOKENS, do_sample=False)
        answer = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
        yield Outcome(lookup, bucket, len(prompt), answer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Examine the demo model.")
    parser.add_argument("--model", type=Path, default=demo_model_path())
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--show-wrong", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    outcomes = list(examine(arguments.model, arguments.count, arguments.seed))
    for low, high in BUCKETS:
        report(f"{low}-{high} tokens", [outcome for outcome in outcomes if outcome.bucket == (low, high)])
    report("all", outcomes)
    if arguments.show_wrong:
        for outcome in outcomes:
            if not outcome.right:
                print(f"{outcome.prompt_tokens} tokens: {outcome.answer!r}, not {outcome.lookup.answer!r}")


def report(name: str, outcomes: list[Outcome]) -> None:
    right = sum(outcome.right for outcome in outcomes)
    print(f"{name:>18}: {right} of {len(outcomes)} right ({right / max(1, len(outcomes)):.1%})")


if __name__ == "__main__":
    main()
