"""What workers say about a request, in the words of the core."""

from __future__ import annotations

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.ladder import Ladder
from baton.services.core.ladder_steps import PartOutput
from baton.services.core.request import SampledToken
from baton.services.core.token_order import TokenDelta
from baton.services.gateway.mailbox import Mailbox
from baton.services.gateway.worker_link import Arrival
from baton.services.runtime import convert

# Tokens of one generation that are passed on together, where so many are there.
_MOST_AT_ONCE = 64


def take_plain(ladder: Ladder, arrival: Arrival, behind: Mailbox[Arrival | None]) -> TokenDelta | None:
    """Takes the tokens that ``arrival`` says, and those of all ``behind`` it, as long as nothing but tokens is said.

    None, and nothing is taken, where that is not so from the beginning.
    """
    first_index = 0
    tokens: list[SampledToken] = []
    upcoming: Arrival | None = arrival
    while upcoming is not None and upcoming.output is not None and len(tokens) < _MOST_AT_ONCE:
        output = upcoming.output
        token_ids = _plain_tokens(output)
        if token_ids is None or not ladder.take_next(
            upcoming.attempt, upcoming.link.incarnation, output.first_index, token_ids
        ):
            break
        if not tokens:
            first_index = output.first_index
        else:
            behind.get_nowait()
        tokens += map(SampledToken, token_ids)
        upcoming = behind.peek()
    return TokenDelta(first_index, tuple(tokens)) if tokens else None


def part_output(output: pb.RequestOutput) -> PartOutput:
    """Any output."""
    if output.finish_reason == pb.FINISH_REASON_ERROR:
        return PartOutput(error=convert.error_from_wire(output.error))
    prompt = tuple(convert.logprobs_from_wire(token) for token in output.prompt_tokens)
    delta = TokenDelta(
        first_index=output.first_index,
        tokens=tuple(convert.token_from_wire(token) for token in output.tokens),
        finish_reason=convert.finish_reason_from_wire(output.finish_reason),
        stop_token_id=output.stop_token_id if output.HasField("stop_token_id") else None,
        cached_tokens=output.prefill.cached_tokens if output.HasField("prefill") else None,
        prompt_logprobs=prompt or None,
    )
    return PartOutput(delta, handed_over=output.handed_over)


def _plain_tokens(output: pb.RequestOutput) -> list[int] | None:
    """Nearly all outputs: ids of new tokens, mostly of one, and nothing else is said. None for any other."""
    if output.finish_reason or output.handed_over or output.HasField("prefill"):
        return None
    if output.HasField("transfer") or output.HasField("fetch") or output.prompt_tokens:
        return None
    token_ids = []
    for token in output.tokens:
        if token.HasField("logprob"):
            return None
        token_ids.append(token.token_id)
    return token_ids or None
