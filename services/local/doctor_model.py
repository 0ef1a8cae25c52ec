"""What ``baton doctor`` looks at in a model folder: everything that a worker would refuse at its start, before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from baton.services.core.errors import ConfigurationError
from baton.services.local.bundled import BUNDLED_MODEL
from baton.services.local.doctor import Finding, Level, Questions
from baton.services.local.doctor_machine import available_memory, size_words

_TEMPLATE_NAMES = ("chat_template.jinja", "chat_template.json")


def check_model(questions: Questions) -> Iterator[Finding]:
    """Configuration, weights' headers, tokenizer, chat template, size. Nothing is downloaded."""
    # They import torch.
    from baton.services.engine.checkpoint import Checkpoint
    from baton.services.engine.config_file import read_json_object
    from baton.services.engine.model_folder import check_tokenizer, resolve_model_folder
    from baton.services.engine.models.registry import read_model_config
    from baton.services.engine.weights import required_weights

    named = questions.model or str(BUNDLED_MODEL)
    if not Path(named).expanduser().is_dir():
        mend = "give a folder; a hub id is fetched by baton serve, and can be looked at afterwards in its cache"
        yield Finding("model", Level.WARN, f"{named} is no folder, so nothing in it was looked at", mend)
        return
    try:
        folder = resolve_model_folder(named)
        family, config = read_model_config(folder)
    except ConfigurationError as error:
        yield Finding("model", Level.FAIL, error.message, "the folder must hold a supported Hugging Face model")
        return
    shape = f"{config.num_layers} layers, context {config.max_position_embeddings:,}"
    yield Finding("model", Level.OK, f"{config.architecture} ({shape}) in {folder}")
    try:
        checkpoint = Checkpoint.open(folder, family.base_prefix)
        tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
        required = required_weights(family, config)
        checkpoint.check(required, family.ignored_weights + tied)
    except ConfigurationError as error:
        yield Finding("weights", Level.FAIL, error.message, "fetch the safetensors files again, whole")
    else:
        tensors = [tensor for name in required if (tensor := checkpoint.find(name)) is not None]
        yield from _check_size(sum(tensor.num_bytes for tensor in tensors), len(tensors), questions)
    try:
        check_tokenizer(folder, config.vocab_size)
    except ConfigurationError as error:
        yield Finding("tokenizer", Level.FAIL, error.message, "fetch the tokenizer's files of the same model")
        return
    yield Finding("tokenizer", Level.OK, "its tokens have embeddings")
    settings = folder / "tokenizer_config.json"
    try:
        has_template = settings.exists() and bool(read_json_object(settings).get("chat_template"))
    except ConfigurationError as error:
        yield Finding("chat template", Level.FAIL, error.message, "fetch the file again")
        return
    if has_template or any((folder / name).exists() for name in _TEMPLATE_NAMES):
        yield Finding("chat template", Level.OK, "there is one")
    else:
        mend = "chat requests will be refused; /v1/completions works. An instruct version of the model has a template"
        yield Finding("chat template", Level.WARN, "there is none", mend)


def _check_size(num_bytes: int, num_tensors: int, questions: Questions) -> Iterator[Finding]:
    # One copy in each of two workers, beside their KV caches.
    needed = 2 * (num_bytes + questions.kv_cache_bytes)
    available = available_memory()
    found = f"{num_tensors:,} tensors, {size_words(num_bytes)}"
    if available is not None and needed > available:
        words = f"{found}: two workers need {size_words(needed)} with their KV caches, {size_words(available)} are available"
        yield Finding("weights", Level.FAIL, words, "a smaller model, a lower --kv-cache-memory, or --mode colocated")
    else:
        yield Finding("weights", Level.OK, found)
