"""When a generation ends, and which requests can never be served."""

from __future__ import annotations

from baton.services.core.block_pool import BlockPool
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, Request


def append_token(request: Request, token_id: int, max_model_len: int) -> FinishReason | None:
    """Add a sampled token; the reason where it is the last. The caller moves the request to its end.

    Sets ``stop_token_id`` for a stop token; the end of sequence, unless ignored, leaves it None even if it is both.
    Under a grammar the end of sequence is always the end: it can only be drawn where the grammar is complete.
    """
    request.token_ids.append(token_id)
    sampling = request.sampling
    num_output_tokens = request.num_output_tokens
    is_stop = token_id in sampling.stop_token_ids
    is_eos = token_id in sampling.eos_token_ids and not sampling.ignore_eos
    is_complete = is_eos and sampling.grammar is not None
    if is_complete or ((is_stop or is_eos) and num_output_tokens >= sampling.min_tokens):
        request.stop_token_id = None if is_eos else token_id
        return FinishReason.STOP
    if num_output_tokens >= sampling.max_tokens or request.num_tokens >= max_model_len:
        return FinishReason.LENGTH
    return None


def ends_with_next_token(request: Request, max_model_len: int) -> bool:
    """Whatever the next token is, it is the last one: nothing is left to hand over."""
    return request.num_output_tokens + 1 >= request.sampling.max_tokens or request.num_tokens + 1 >= max_model_len


def max_kv_tokens(request: Request, max_model_len: int) -> int:
    """Most tokens whose KV the request can ever need: the last token is never computed."""
    return max(request.num_tokens, min(request.max_total_tokens, max_model_len) - 1)


def check_can_be_served(request: Request, pool: BlockPool, max_model_len: int, num_kv_tokens: int) -> None:
    """Raise BatonError for a request that no amount of waiting helps. ``num_kv_tokens``: most that it needs here."""
    if not request.token_ids or not 1 <= request.num_prompt_tokens <= request.num_tokens:
        raise BatonError(
            ErrorCode.INVALID_REQUEST,
            f"request {request.request_id} says that {request.num_prompt_tokens} of its {request.num_tokens} tokens are "
            "its prompt; it must be at least one, and not more than there are",
            param="prompt",
        )
    if request.sampling.max_tokens <= request.num_output_tokens:
        raise BatonError(
            ErrorCode.INVALID_REQUEST,
            f"request {request.request_id} has {request.num_output_tokens} output tokens of at most "
            f"{request.sampling.max_tokens}: nothing is left to generate",
            param="max_tokens",
        )
    if request.num_tokens >= max_model_len:
        raise BatonError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"this model's maximum context length is {max_model_len} tokens; the prompt has {request.num_tokens}, which "
            "leaves no room for an answer",
            param="prompt",
        )
    pool_tokens = pool.num_blocks * pool.block_size
    if num_kv_tokens > pool_tokens:
        raise BatonError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"the request may grow to {num_kv_tokens} tokens of KV cache; this worker's whole cache holds {pool_tokens} "
            f"({pool.num_blocks} blocks of {pool.block_size})",
            param="max_tokens",
        )
