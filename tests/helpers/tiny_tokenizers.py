"""Small real tokenizers of the kinds that models use, trained in a moment."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('this model knows no tools') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CORPUS = [
    "the quick brown fox jumps over the lazy dog and the dog does not mind at all",
    "hello world, hello gateway: one prompt goes in, many tokens come out again",
    "Grüße aus Köln, 你好世界, こんにちは, Привет мир, مرحبا بالعالم 🙂 👩‍👩‍👧",
] * 20


def byte_level() -> Tokenizer:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """SentencePiece-style Unigram whose decoder is Metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    _add_bos(tokenizer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """SentencePiece-style BPE with byte tokens, as in Llama 2 and Mistral."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    trained.train_from_iterator([line for line in _CORPUS if line.isascii()], trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = {token: i for i, token in enumerate([*special, *byte_tokens])}
    for token in sorted(model["vocab"], key=model["vocab"].__getitem__):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    _add_bos(tokenizer)
    return tokenizer


def whole_words() -> Tokenizer:
    """Whole words joined by spaces: a decoder without pieces."""
    words = sorted(set(" ".join(_CORPUS).replace(",", " ").split()))
    vocab = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _add_bos(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )


KINDS = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "byte_fallback": byte_fallback,
    "whole_words": whole_words,
}


@functools.cache
def tokenizer_json(kind: str) -> str:
    """tokenizer.json of one of ``KINDS``."""
    return str(KINDS[kind]().to_str())


def load(kind: str) -> Tokenizer:
    """A fresh tokenizer of one of ``KINDS``."""
    return Tokenizer.from_str(tokenizer_json(kind))


def as_transformers(kind: str = "byte_level", chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """The same as transformers' fast tokenizer."""
    eos_token = END_OF_TEXT if kind == "byte_level" else None
    return PreTrainedTokenizerFast(tokenizer_object=load(kind), eos_token=eos_token, chat_template=chat_template)


def write_folder(folder: Path, kind: str = "byte_level", chat_template: str = CHAT_TEMPLATE) -> Path:
    """The tokenizer's files of a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(kind))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
