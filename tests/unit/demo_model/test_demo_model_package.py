"""The model folder that ships: its files, its tokenizer and template, and what it answers."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
import torch
from helpers.engine_driver import Driver, make_request
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.services.engine.engine import Engine
from baton.services.engine.loader import load_model
from baton.services.local.demo_model import corpus, data, demo_model_path
from baton.services.local.demo_model.evaluate import examine

FACTS = "The code for amber fox is 4821. The code for red door is 1190. The code for quiet lake is 0753."


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_path())


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()


def ask(messages: list[data.Message], max_new_tokens: int = 40) -> str:
    prompt = tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.inference_mode():
        ids = model().generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer().decode(ids[0, len(prompt) :], skip_special_tokens=True))


def user(content: str) -> data.Message:
    return {"role": "user", "content": content}


def test_weights_are_small_bfloat16_and_complete() -> None:
    path = demo_model_path() / "model.safetensors"
    assert 2_000_000 <= path.stat().st_size <= 8_000_000
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert {part.get_dtype() for part in stored.values()} == {"BF16"}
    expected = {name: list(tensor.shape) for name, tensor in model().state_dict().items() if name != "lm_head.weight"}
    assert {name: part.get_shape() for name, part in stored.items()} == expected


def test_config_needs_no_code_and_leaves_room_for_long_prompts() -> None:
    config = json.loads((demo_model_path() / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert "auto_map" not in config
    assert config["max_position_embeddings"] >= 2048
    assert config["vocab_size"] == len(tokenizer())
    assert config["eos_token_id"] == tokenizer().eos_token_id
    assert model().dtype == torch.float32


@pytest.mark.parametrize(
    "text",
    [
        "The code for amber fox is 4821.",
        "  two  spaces, a\ttab and\r\n\n three line ends \n",
        "Zażółć gęślą jaźń, 你好世界, здравствуй, שלום",
        "👩‍👩‍👧‍👦 is one family, é is not é",
        "nul \x00 and the last plane \U0010ffff",
        "",
    ],
)
def test_tokenizer_gives_text_back_unchanged(text: str) -> None:
    ids = tokenizer()(text).input_ids
    assert tokenizer().decode(ids) == text
    assert all(0 <= index < len(tokenizer()) for index in ids)


def test_a_key_is_two_tokens_and_a_value_two() -> None:
    for word in ("amber", "zebra", "yellow"):
        assert len(tokenizer()(f" {word}").input_ids) == 1
    assert tokenizer().tokenize(" 4821") == ["Ġ48", "21"]


def test_template_renders_roles_parts_and_the_generation_prompt() -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi."},
    ]
    text = tokenizer().apply_chat_template(messages, tokenize=False)
    assert text == "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi.<|end|>"
    text = tokenizer().apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|assistant|>"
    with pytest.raises(Exception, match="not tool"):
        tokenizer().apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_texts_have_the_template_s_form() -> None:
    chat = data.make_chat(random.Random(3), data.LEVELS[-1], len)
    assert tokenizer().apply_chat_template(chat, tokenize=False) == data.render(chat)


@pytest.mark.parametrize(("key", "value"), [("amber fox", "4821"), ("red door", "1190"), ("quiet lake", "0753")])
def test_facts_are_looked_up_and_the_answer_ends(key: str, value: str) -> None:
    assert ask([user(f"{FACTS} What is the code for {key}?")]) == f"The code for {key} is {value}."


def test_facts_are_looked_up_in_a_later_turn() -> None:
    answer = "The code for amber fox is 4821."
    chat = [user(f"{FACTS} What is the code for amber fox?"), {"role": "assistant", "content": answer}]
    assert ask([*chat, user("What is the code for red door?")]) == "The code for red door is 1190."


def test_the_answer_depends_on_one_token_far_back() -> None:
    filler = " ".join(corpus.sentences()[:40])
    for value in ("3175", "3176", "9076"):
        prompt = f"The code for brave owl is {value}. {filler} What is the code for brave owl?"
        assert ask([user(prompt)]) == f"The code for brave owl is {value}."


def test_a_damaged_kv_cache_gives_another_answer() -> None:
    prompt = tokenizer().apply_chat_template(
        [user(f"{FACTS} What is the code for red door?")], add_generation_prompt=True, return_dict=False
    )
    value = tokenizer()(" 1190").input_ids
    at = next(index for index in range(len(prompt)) if prompt[index : index + len(value)] == value)

    loaded = load_model(str(demo_model_path()), dtype="float32", device="cpu")

    def answer(damaged: bool) -> str:
        driver = Driver(Engine(loaded, num_blocks=64))
        request = make_request(prompt, max_tokens=20)
        driver.step([(request, len(prompt) - 1)])
        block_size = driver.engine.cache.block_size
        for position in range(at, at + len(value)) if damaged else ():
            block_id, offset = request.block_table[position // block_size], position % block_size
            driver.engine.kv_cache[block_id, :, 1, offset] = 0  # the values, of all layers
        driver.run([request])
        return str(tokenizer().decode(driver.output(request), skip_special_tokens=True))

    assert answer(damaged=False) == "The code for red door is 1190."
    assert "1190" not in answer(damaged=True)


def test_most_fresh_look_ups_of_every_length_are_right() -> None:
    outcomes = list(examine(demo_model_path(), count=16, seed=7))
    assert [outcome.bucket[0] <= outcome.prompt_tokens <= outcome.bucket[1] for outcome in outcomes] == [True] * 16
    assert sum(outcome.right for outcome in outcomes) >= 15


@pytest.mark.parametrize("greeting", ["Hello", "Hi!"])
def test_a_greeting_is_answered_with_what_to_ask(greeting: str) -> None:
    assert ask([user(greeting)]) == data.GREETING


@pytest.mark.parametrize("key", ["amber fox", "tall silo"])
def test_nothing_is_known_by_heart(key: str) -> None:
    assert not any(char.isdigit() for char in ask([user(f"What is the code for {key}?")]))
