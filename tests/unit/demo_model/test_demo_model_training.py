"""The script that makes the demo model, over its first steps."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.services.local.demo_model import corpus, data, demo_model_path, initial, words
from baton.services.local.demo_model.batches import IGNORED, BatchMaker
from baton.services.local.demo_model.model import build_model
from baton.services.local.demo_model.tokenizer import ASSISTANT, END, VOCAB_SIZE, train_tokenizer
from baton.services.local.demo_model.train import Curriculum, Recipe, train


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The one that ships: training it takes seconds."""
    return Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))


def test_two_steps_give_a_loadable_folder_and_the_same_weights_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    recipe = Recipe(steps=2, tokens_per_step=256, warmup=1, cooldown=1)
    first = train(recipe, tokenizer, tmp_path / "first", report_every=1, export_every=1)
    second = train(recipe, tokenizer, tmp_path / "second")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert (tmp_path / "first/model.safetensors").read_bytes() == (tmp_path / "second/model.safetensors").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert torch.equal(loaded.model.embed_tokens.weight, first.model.embed_tokens.weight.bfloat16().float())
    assert AutoTokenizer.from_pretrained(tmp_path / "first").eos_token == END
    config = json.loads((tmp_path / "first/config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == VOCAB_SIZE


def test_the_trained_tokenizer_has_a_token_for_every_word_and_two_for_every_value() -> None:
    tokenizer = train_tokenizer()
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [word for word in words.ADJECTIVES + words.NOUNS if len(tokenizer.encode(f" {word}").ids) != 1] == []
    assert [value for value in range(10_000) if len(tokenizer.encode(f" {value:04}").ids) != 2] == []


def test_only_answers_are_learned_from_look_ups(tokenizer: Tokenizer) -> None:
    batch = BatchMaker(tokenizer, tokens=400).lookups(random.Random(0), data.LEVELS[3])
    assert batch.inputs.shape == batch.labels.shape == (2, 192)
    for inputs, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        learned = tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=False)
        assert learned.startswith("The ")
        assert "?" not in learned
        expected = False
        for token, label in zip(inputs, labels, strict=True):
            expected = token == tokenizer.token_to_id(ASSISTANT) or (expected and token != tokenizer.token_to_id(END))
            assert (label != IGNORED) == expected


def test_the_laid_out_heads_copy_what_followed_before(tokenizer: Tokenizer) -> None:
    model = build_model(tokenizer)
    initial.lay_out(model, torch.Generator().manual_seed(0))
    period = torch.randint(4, VOCAB_SIZE, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = model(torch.cat([period, period], dim=1)).logits
    predicted = logits[0, 24:-1].argmax(-1)
    assert (predicted == period[0, 1:]).float().mean() > 0.4  # by chance: 1 in 3072


@pytest.mark.parametrize("level", data.LEVELS)
def test_chats_ask_for_stated_facts_and_answer_right(level: data.Level) -> None:
    chat = data.make_chat(random.Random(str(level)), level, lambda text: len(text) // 4)
    if chat[0]["role"] == "system":
        chat = chat[1:]
    stated = chat[0]["content"]
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    assert len(answers) == len(set(answers)) == len(chat) // 2
    for question, answer in zip(chat[::2], answers, strict=True):
        match = re.fullmatch(r"The \w+ (?:for|of) (?P<key>.+?) is (?P<value>.+)\.", answer)
        assert match, answer
        key, value = match["key"], match["value"]
        assert key in question["content"]
        assert f"{key} is {value}" in stated or f"- {key}: {value}" in stated


def test_look_ups_take_about_the_tokens_they_were_asked_to() -> None:
    for tokens in (50, 300, 1500):
        lookup = data.make_lookup(random.Random(tokens), tokens, lambda text: len(text) // 4 + 1)
        text = lookup.messages[0]["content"]
        assert f"{lookup.answer[:-1]}." in text
        assert lookup.value in lookup.answer
        assert tokens / 2 < len(text) / 4 < tokens * 1.5


def test_the_curriculum_opens_the_next_level_at_nine_tenths_right() -> None:
    curriculum = Curriculum(newest_share=1.0)
    for _ in range(100):
        curriculum.record(0, 0.89)
    assert curriculum.newest == 0
    for _ in range(100):
        curriculum.record(0, 1.0)
    assert curriculum.newest == 1
    for _ in range(100):
        curriculum.record(0, 1.0)
    assert curriculum.newest == 1
    for level in range(1, len(data.LEVELS)):
        for _ in range(100):
            curriculum.record(level, 1.0)
    assert curriculum.newest == len(data.LEVELS) - 1


def test_the_corpus_is_prose() -> None:
    assert sum(map(len, corpus.paragraphs())) > 200_000
    assert len(corpus.sentences()) > 1000
    assert not any("\n" in line or ">>>" in line for line in corpus.paragraphs())
