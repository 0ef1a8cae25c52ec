"""What workers say about a request, in the words of the core."""

from __future__ import annotations

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.ladder_steps import PartOutput
from baton.services.core.request import SampledToken
from baton.services.core.token_order import TokenDelta
from baton.services.runtime import convert
from baton.services.runtime.token_columns import TokenRow


def plain_delta(row: TokenRow) -> TokenDelta:
    """Tokens in the middle of a generation."""
    return TokenDelta(row.first_index, tuple(map(SampledToken, row.token_ids)))


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


def plain_token_ids(output: pb.RequestOutput) -> list[int] | None:
    """Where the ids of new tokens are all that is said; None for any other output.

    Workers send such tokens in columns, all but those of the release before.
    """
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
