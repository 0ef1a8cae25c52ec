"""Trains the demo model: `python -m baton.services.local.demo_model.train --out DIR`, some ten minutes on one core.

The curriculum goes to the next level, with twice the facts, whenever the model gets 90% of the values right. All data is drawn
from the seed, so that the same seed on the same versions of Python and torch gives the same weights.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from baton.services.local.demo_model import initial
from baton.services.local.demo_model.batches import IGNORED, Batch, BatchMaker
from baton.services.local.demo_model.data import LEVELS
from baton.services.local.demo_model.model import build_model, export
from baton.services.local.demo_model.tokenizer import train_tokenizer

_SMOOTHING = 0.8
_PASSED = 0.9


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights.

    The learning rate rises over the first `warmup` steps and falls to zero over the last `cooldown` ones.
    """

    seed: int = 0
    steps: int = 460
    tokens_per_step: int = 2048
    learning_rate: float = 2e-3
    warmup: int = 50
    cooldown: int = 220
    weight_decay: float = 0.05
    prose_share: float = 0.3
    small_talk_share: float = 0.08
    newest_level_share: float = 0.65


class Curriculum:
    """Which level comes next, from how many values were right so far."""

    def __init__(self, newest_share: float) -> None:
        self.newest = 0
        self.accuracy = [0.0] * len(LEVELS)  # moving averages
        self._newest_share = newest_share

    def draw(self, rng: random.Random) -> int:
        """The newest level mostly, else any up to it."""
        return self.newest if rng.random() < self._newest_share else rng.randrange(self.newest + 1)

    def record(self, level: int, accuracy: float) -> None:
        """Takes the share of right value tokens in one batch; opens the next level when the newest is passed."""
        self.accuracy[level] = _SMOOTHING * self.accuracy[level] + (1 - _SMOOTHING) * accuracy
        if level == self.newest < len(LEVELS) - 1 and self.accuracy[level] >= _PASSED:
            self.newest += 1


class Trainer:
    """One training run."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.curriculum = Curriculum(recipe.newest_level_share)
        self.model = build_model(tokenizer)
        initial.lay_out(self.model, torch.Generator().manual_seed(recipe.seed))
        self._batches = BatchMaker(tokenizer, recipe.tokens_per_step)
        texts = (tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size()))
        self._is_number = torch.tensor([any(char.isdigit() for char in text or "") for text in texts])
        parameters = list(self.model.parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
        )

    def step(self, index: int) -> float:
        """Does training step `index` and returns its loss."""
        rng = random.Random(f"{self.recipe.seed}:{index}")  # noqa: S311 - training data, not a secret
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(index)
        kind = rng.random()
        if kind < self.recipe.prose_share:
            return self._learn(self._batches.prose(rng))[0]
        if kind < self.recipe.prose_share + self.recipe.small_talk_share:
            return self._learn(self._batches.small_talk(rng))[0]
        level = self.curriculum.draw(rng)
        loss, accuracy = self._learn(self._batches.lookups(rng, LEVELS[level]))
        self.curriculum.record(level, accuracy)
        return loss

    def _learn(self, batch: Batch) -> tuple[float, float]:
        """One optimizer step: the loss, and the share of number tokens that were predicted right (0 if there are none)."""
        hidden = self.model.model(input_ids=batch.inputs, use_cache=False).last_hidden_state
        learned = batch.labels != IGNORED
        targets = batch.labels[learned]
        logits = F.linear(hidden[learned], self.model.lm_head.weight)
        loss = F.cross_entropy(logits, targets)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        numbers = self._is_number[targets]
        right = logits.detach().argmax(-1)[numbers] == targets[numbers]
        return loss.item(), right.float().mean().item() if numbers.any() else 0.0

    def _learning_rate(self, index: int) -> float:
        recipe = self.recipe
        return recipe.learning_rate * min(1.0, (index + 1) / recipe.warmup, (recipe.steps - index) / recipe.cooldown)


def train(
    recipe: Recipe, tokenizer: Tokenizer, folder: Path, report_every: int = 20, export_every: int = 100
) -> Qwen3ForCausalLM:
    """Runs `recipe`; the model folder is written every `export_every` steps and at the end."""
    trainer = Trainer(recipe, tokenizer)
    started = time.monotonic()
    for index in range(recipe.steps):
        loss = trainer.step(index)
        if index % report_every == 0:
            seconds = time.monotonic() - started
            accuracy = " ".join(f"{value:.2f}" for value in trainer.curriculum.accuracy)
            print(f"step {index}, {seconds:.0f} s, loss {loss:.3f}, accuracy by level {accuracy}", flush=True)
        if (index + 1) % export_every == 0:
            export(trainer.model, tokenizer, folder)
    export(trainer.model, tokenizer, folder)
    return trainer.model


def main() -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(Recipe(seed=arguments.seed, steps=arguments.steps), train_tokenizer(), arguments.out)


if __name__ == "__main__":
    main()
