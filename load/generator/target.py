"""The server under test, before the run: is it there, which model, and what are its tokens."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from baton.load.generator.events import error_words
from baton.load.generator.http_client import ConnectionBroken, HttpClient
from baton.load.generator.prompts import Vocabulary
from baton.services.local.demo_model.words import ADJECTIVES, NOUNS
from baton.services.runtime.client_tls import advice

Endpoint = Literal["chat", "completions"]

_ANSWER_S = 30.0
_WORDS = ADJECTIVES + NOUNS
_SAMPLE_WORDS = 200
# How tokenizers mark the space before a word: byte-level BPE, SentencePiece, plain.
_SPACES = "\u0120\u2581 "


class ServerUnusable(Exception):
    """It cannot be measured, and why."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What /v1/models says. ``max_len``: prompt and answer together, where the server says it."""

    name: str
    max_len: int | None


async def find_model(client: HttpClient, name: str | None) -> ServedModel:
    """The model with ``name``, or the first one. Raises ServerUnusable."""
    status, answer = await _call(client, "GET", "/v1/models", None)
    if status != 200 or not isinstance(answer, dict):
        raise ServerUnusable(f"GET /v1/models answered {status}: {error_words(answer)}")
    models = {str(model.get("id")): model for model in answer.get("data") or ()}
    if name is None and not models:
        raise ServerUnusable("GET /v1/models lists none; name one with --served-model-name")
    chosen = name if name is not None else next(iter(models))
    if chosen not in models:
        raise ServerUnusable(f"there is no model {chosen!r}; there are: {', '.join(models)}")
    max_len = models[chosen].get("max_model_len")
    return ServedModel(chosen, max_len if isinstance(max_len, int) else None)


async def word_vocabulary(client: HttpClient, model: str, endpoint: Endpoint) -> Vocabulary[str]:
    """Words, and how many tokens the server makes of them.

    Words that are one token are preferred, so that lengths are exact. Counted by POST /tokenize; where there is none, by the
    usage of two requests for one token. Raises ServerUnusable.
    """
    pieces = await _pieces(client, model)
    words = [word for word in _WORDS if any(space + word in pieces for space in _SPACES)] or list(_WORDS)
    sample = random.Random(0).choices(words, k=_SAMPLE_WORDS)
    can_tokenize = bool(pieces)
    one, all_of_them = [
        await _count(client, model, endpoint, " ".join(part), can_tokenize) for part in (sample[:1], sample)
    ]
    tokens_per_word = (all_of_them - one) / (_SAMPLE_WORDS - 1)
    if tokens_per_word <= 0:
        raise ServerUnusable(f"{_SAMPLE_WORDS} words count {all_of_them} tokens there, one word {one}")
    return Vocabulary(words, tokens_per_word, one - tokens_per_word)


async def token_vocabulary(client: HttpClient, model: str) -> Vocabulary[int]:
    """Ids of ordinary tokens, for prompts that are token ids. Raises ServerUnusable where the server has no /tokenize."""
    status, answer = await _call(
        client, "POST", "/tokenize", {"model": model, "prompt": " ".join(_WORDS), "add_special_tokens": False}
    )
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if status != 200 or not tokens:
        raise ServerUnusable(f"prompts of token ids need POST /tokenize, which answered {status}; use --prompt text")
    return Vocabulary(sorted(set(tokens)))


async def _pieces(client: HttpClient, model: str) -> set[str]:
    """The tokens of all words as text; empty where the server does not say."""
    body = {"model": model, "prompt": " " + " ".join(_WORDS), "return_token_strs": True}
    status, answer = await _call(client, "POST", "/tokenize", body)
    if status != 200 or not isinstance(answer, dict) or not isinstance(answer.get("count"), int):
        return set()
    return set(answer.get("token_strs") or ("",))  # not empty: the server can count


async def _count(client: HttpClient, model: str, endpoint: Endpoint, text: str, can_tokenize: bool) -> int:
    prompt = prompt_fields(endpoint, text)
    if can_tokenize:
        status, answer = await _call(client, "POST", "/tokenize", {"model": model, **prompt})
        if status == 200:
            return int(answer["count"])
    body = {"model": model, "max_tokens": 1, **prompt}
    status, answer = await _call(client, "POST", path_of(endpoint), body)
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if status != 200 or not usage:
        raise ServerUnusable(f"a first request to {path_of(endpoint)} was answered {status}: {error_words(answer)}")
    return int(usage["prompt_tokens"])


def path_of(endpoint: Endpoint) -> str:
    return "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"


def prompt_fields(endpoint: Endpoint, text: str) -> Mapping[str, Any]:
    """A body's fields for one prompt."""
    return {"messages": [{"role": "user", "content": text}]} if endpoint == "chat" else {"prompt": text}


async def _call(client: HttpClient, method: str, path: str, body: Any) -> tuple[int, Any]:
    """Status and JSON of the answer, or its text. Raises ServerUnusable where none comes."""
    content = bytearray()
    try:
        async with asyncio.timeout(_ANSWER_S):
            sent = None if body is None else orjson.dumps(body)
            response = await client.request(method, path, sent, on_body=content.extend)
    except TimeoutError:
        raise ServerUnusable(f"no answer to {method} {path} within {_ANSWER_S:.0f} s") from None
    except (OSError, ConnectionBroken) as error:
        hint = f"; {advice(error)}" if isinstance(error, ssl.SSLError) else ""
        raise ServerUnusable(f"{method} {path}: {error}{hint}") from None
    try:
        return response.status, orjson.loads(content)
    except ValueError:
        return response.status, content.decode(errors="replace")
