"""Logprobs as OpenAI's two APIs show them. Values are natural logs of the model's own distribution, before temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.services.core.request import SampledToken, TokenLogprobs
from baton.services.gateway.choice import OutputToken
from baton.services.gateway.detokenizer import Detokenizer
from baton.services.gateway.token_pieces import TokenPieces

# JSON has no infinity.
MIN_LOGPROB = -9999.0


def chat_logprobs(tokens: Sequence[OutputToken], pieces: TokenPieces) -> list[dict[str, Any]]:
    """Entries of ``choices[].logprobs.content``, one per token. Joined, their ``bytes`` are the content.

    A token that is not shown (end of sequence, say) has a name but no bytes.
    """
    entries = []
    for token in tokens:
        logprobs = token.sampled.logprobs
        assert logprobs is not None
        name = token.data.decode(errors="replace") if token.data else pieces.name(token.sampled.token_id)
        entry = _chat_entry(name, token.data, logprobs.logprob)
        entry["top_logprobs"] = [
            _chat_entry(pieces.name(token_id), pieces.piece(token_id), logprob) for token_id, logprob in logprobs.top
        ]
        entries.append(entry)
    return entries


def _chat_entry(name: str, data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": name, "logprob": _clamp(logprob), "bytes": list(data)}


def completion_logprobs(tokens: Sequence[OutputToken], pieces: TokenPieces, text_start: int) -> dict[str, list[Any]]:
    """``choices[].logprobs`` of completions: four lists of one length. ``text_start``: characters before the output.

    The token itself is among its ``top_logprobs``, which have one entry more where it is not one of the likeliest. A
    token without logprobs (the first of an echoed prompt) has nulls.
    """
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        logprobs = token.sampled.logprobs
        lists["tokens"].append(_escaped(token.data) if token.data else pieces.name(token.sampled.token_id))
        lists["text_offset"].append(text_start + token.text_offset)
        if logprobs is None:
            lists["token_logprobs"].append(None)
            lists["top_logprobs"].append(None)
            continue
        lists["token_logprobs"].append(_clamp(logprobs.logprob))
        alternatives = dict(logprobs.top)
        alternatives.setdefault(token.sampled.token_id, logprobs.logprob)
        top: dict[str, float] = {}
        for token_id, logprob in alternatives.items():
            name = _escaped(pieces.piece(token_id))
            # Two tokens may read alike; the less likely one is told by its id.
            top[name if name not in top else f"token_id:{token_id}"] = _clamp(logprob)
        lists["top_logprobs"].append(top)
    return lists


def prompt_as_tokens(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], detokenizer: Detokenizer
) -> list[OutputToken]:
    """An echoed prompt's tokens with their logprobs and places, for ``completion_logprobs``."""
    tokens, num_chars = [], 0
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        text = detokenizer.push(token_id)
        tokens.append(OutputToken(SampledToken(token_id, logprob), detokenizer.last_piece, num_chars))
        num_chars += len(text)
    return tokens


def prompt_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None] | None, pieces: TokenPieces
) -> list[dict[str, Any] | None] | None:
    """vLLM's ``prompt_logprobs``: per token the likeliest ids and the token itself; null for the first."""
    if logprobs is None:
        return None
    entries: list[dict[str, Any] | None] = []
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        if logprob is None:
            entries.append(None)
            continue
        ranked: dict[int, tuple[float, int | None]] = {
            alternative: (value, rank) for rank, (alternative, value) in enumerate(logprob.top, start=1)
        }
        ranked.setdefault(token_id, (logprob.logprob, None))  # its rank is not known
        entries.append(
            {
                str(alternative): {"logprob": _clamp(value), "rank": rank, "decoded_token": pieces.name(alternative)}
                for alternative, (value, rank) in ranked.items()
            }
        )
    return entries


def _escaped(data: bytes) -> str:
    """Text, or OpenAI's notation for a token that is not whole characters: ``bytes:\\xe2\\x98``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _clamp(logprob: float) -> float:
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB
