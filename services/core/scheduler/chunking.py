"""How the tokens of a step are shared among prompts."""

from __future__ import annotations

from collections.abc import Sequence


def share_tokens(remaining: Sequence[int], budget: int, short_share: float) -> list[int]:
    """Tokens for each prompt this step; ``remaining`` is what each still has to compute, in the order of their turns.

    In that order, with one exception: a prompt that would fit into ``short_share`` of the budget is short, and
    as much of that share as short prompts behind a long one need is kept back for them. So a long prompt delays the short
    ones behind it by a step or two and not by its own length, and is itself slowed to ``1 - short_share`` at worst.
    No token of the budget is left over while a prompt could use it.
    """
    short_tokens = int(budget * short_share)
    first_long = next((i for i, tokens in enumerate(remaining) if tokens > short_tokens), len(remaining))
    kept_back = min(short_tokens, sum(tokens for tokens in remaining[first_long:] if tokens <= short_tokens))
    shares: list[int] = []
    for tokens in remaining:
        if tokens <= short_tokens:
            share = min(tokens, budget)
            if len(shares) > first_long:
                kept_back = max(0, kept_back - share)
        else:
            share = max(0, min(tokens, budget - kept_back))
        budget -= share
        shares.append(share)
    return shares


def share_by_rank(remaining: Sequence[tuple[int, bool]], budget: int, short_share: float) -> list[int]:
    """The same for prompts of which the last ones may give way (the second part of each pair): they get what is left over."""
    first_yielding = next((i for i, (_, gives_way) in enumerate(remaining) if gives_way), len(remaining))
    tokens = [num_tokens for num_tokens, _ in remaining]
    shares = share_tokens(tokens[:first_yielding], budget, short_share)
    return shares + share_tokens(tokens[first_yielding:], budget - sum(shares), short_share)
