"""What workers say about a request, in the words of the core."""

from __future__ import annotations

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.ladder_steps import PartOutput
from baton.services.core.request import SampledToken
from baton.services.core.token_order import TokenDelta
from baton.services.runtime import convert


def plain_token(output: pb.RequestOutput) -> TokenDelta | None:
    """Nearly all outputs: one token, and nothing else is said. None for any other."""
    tokens = output.tokens
    if len(tokens) != 1 or output.finish_reason or output.handed_over or output.prompt_tokens:
        return None
    if output.HasField("prefill") or output.HasField("transfer") or output.HasField("fetch"):
        return None
    token = tokens[0]
    return None if token.HasField("logprob") else TokenDelta(output.first_index, (SampledToken(token.token_id),))


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
