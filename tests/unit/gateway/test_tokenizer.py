"""The model's tokenizer: folders good and bad, templates good and hostile, prompts too long to be worth tokenising."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_tokenizers

from baton.services.core.errors import BatonError, ConfigurationError, ErrorCode
from baton.services.gateway.tokenizer import ChatOptions, ModelTokenizer, load_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def tokenizer() -> Iterator[ModelTokenizer]:
    tokenizer = ModelTokenizer(tiny_tokenizers.as_transformers())
    yield tokenizer
    tokenizer.close()


def with_template(template: str | None) -> ModelTokenizer:
    return ModelTokenizer(tiny_tokenizers.as_transformers(chat_template=template))


async def encode(tokenizer: ModelTokenizer, text: str, *, special: bool = True, max_tokens: int = 10**6) -> list[int]:
    return await tokenizer.encode(text, add_special_tokens=special, max_tokens=max_tokens, param="prompt")


async def test_a_folder_is_loaded_with_its_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.write_folder(tmp_path))
    ids = await tokenizer.encode_chat(HELLO, ChatOptions(), max_tokens=1000)
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert await tokenizer.decode(ids) == expected
    assert tokenizer.eos_token_id == tiny_tokenizers.load("byte_level").token_to_id(tiny_tokenizers.END_OF_TEXT)


async def test_a_template_file_beside_the_tokenizer_is_found(tmp_path: Path) -> None:
    tiny_tokenizers.write_folder(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(tmp_path)
    assert await tokenizer.decode(await tokenizer.encode_chat(HELLO, ChatOptions(), max_tokens=100)) == "hello!"


async def test_a_folder_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    """GPT-2 and OPT come with vocabulary and merges only."""
    model = json.loads(tiny_tokenizers.tokenizer_json("byte_level"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    assert await tokenizer.decode(await encode(tokenizer, "hello world")) == "hello world"
    assert not tokenizer.has_chat_template


def test_loading_does_not_import_torch(tmp_path: Path) -> None:
    """The gateway is to start at once and to fit into an image of its own."""
    import subprocess

    tiny_tokenizers.write_folder(tmp_path)
    code = (
        "import pathlib, sys; from baton.services.gateway.tokenizer import load_tokenizer;"
        f"load_tokenizer(pathlib.Path({str(tmp_path)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no tokenizer: tokenizer.json is missing"),
        ({"tokenizer.json": "{"}, "cannot be loaded"),
        ({"tokenizer.json": "good", "tokenizer_config.json": "{"}, "tokenizer_config.json cannot be read"),
        ({"tokenizer.json": "good", "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x.X", null]}}'}, "auto_map"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused_by_name(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(tiny_tokenizers.tokenizer_json("byte_level") if content == "good" else content)
    with pytest.raises(ConfigurationError, match=words) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in error.value.message


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    tiny_tokenizers.write_folder(tmp_path)
    marker = tmp_path / "marker"
    (tmp_path / "tokenization_x.py").write_text(f"open({str(marker)!r}, 'w')\nclass X: pass\n")
    config = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError):
        load_tokenizer(tmp_path)
    assert not marker.exists()


# Templates.


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{% for",
        "{{ raise_exception('never') }}",
    ],
)
def test_hostile_and_broken_templates_are_refused_at_start(template: str) -> None:
    """Refused, or harmless: an attribute that the sandbox hides is empty text."""
    tokenizer = with_template(template)
    if template.startswith("{{ ''") or "__mro__" in template:
        try:
            tokenizer.check_chat_template()
        except ConfigurationError:
            return
        assert tokenizer.render_chat(HELLO, ChatOptions()) == ""
    else:
        with pytest.raises(ConfigurationError, match="cannot render one short message"):
            tokenizer.check_chat_template()


def test_an_endless_template_is_refused_in_time() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = 1 %}{% endfor %}{% endfor %}"
    started_s = time.monotonic()
    # Ends its thread soon after: what it computes is only too long for this limit.
    short = endless.replace("99999", "3000")
    with pytest.raises(ConfigurationError, match="did not finish"):
        with_template(short).check_chat_template(timeout_s=0.05)
    assert time.monotonic() - started_s < 5


def test_a_template_that_explodes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="characters of one short message"):
        with_template("{{ 'x' * 2000000 }}").check_chat_template()


def test_no_template_is_no_problem_at_start() -> None:
    with_template(None).check_chat_template()


def test_what_a_template_says_reaches_the_client() -> None:
    with pytest.raises(BatonError, match="this model knows no tools") as error:
        with_template(tiny_tokenizers.CHAT_TEMPLATE).render_chat([{"role": "tool", "content": "x"}], ChatOptions())
    assert (error.value.code, error.value.param) == (ErrorCode.INVALID_REQUEST, "messages")


def test_template_kwargs_are_variables() -> None:
    tokenizer = with_template("{{ 'thinking' if enable_thinking else 'quick' }}")
    for value, text in ((True, "thinking"), (False, "quick")):
        options = ChatOptions(template_kwargs={"enable_thinking": value})
        assert tokenizer.render_chat(HELLO, options) == text


# Text.


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "byte_fallback"])
async def test_decode_is_the_inverse_of_encode(kind: str) -> None:
    """Also where the tokenizer puts a begin-of-sequence token before every text."""
    tokenizer = ModelTokenizer(tiny_tokenizers.as_transformers(kind))
    assert tokenizer.adds_tokens_to_empty_text == (kind != "byte_level")
    for text in ("hello world", "the dog"):
        assert await tokenizer.decode(await encode(tokenizer, text)) == text
        assert await tokenizer.decode(await encode(tokenizer, text, special=False)) == text


async def test_truncation_and_padding_of_the_folder_do_not_apply() -> None:
    wrapped: Any = tiny_tokenizers.as_transformers()
    wrapped.backend_tokenizer.enable_truncation(2)
    wrapped.backend_tokenizer.enable_padding(length=50)
    ids = await encode(ModelTokenizer(wrapped), "the quick brown fox jumps")
    assert ids == tiny_tokenizers.load("byte_level").encode("the quick brown fox jumps").ids


async def test_hopelessly_long_text_is_refused_before_it_is_tokenised(tokenizer: ModelTokenizer) -> None:
    with pytest.raises(BatonError, match="maximum context length is 10 tokens") as error:
        await encode(tokenizer, "x" * 10**7, max_tokens=10)
    assert error.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED


async def test_no_text_that_fits_is_refused(tokenizer: ModelTokenizer) -> None:
    """The longest token, over and over: as many characters per token as there can be."""
    vocab = tiny_tokenizers.load("byte_level").get_vocab()
    text = max((token for token in vocab if token.isalpha() and token.isascii()), key=len) * 50
    ids = await encode(tokenizer, text)
    assert await encode(tokenizer, text, max_tokens=len(ids)) == ids


async def test_words_of_any_length_have_no_limit() -> None:
    tokenizer = ModelTokenizer(tiny_tokenizers.as_transformers("whole_words"))
    assert len(await encode(tokenizer, "y" * 10**5, max_tokens=1)) == 1
