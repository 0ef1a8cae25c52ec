"""The requests that a worker is running, and what it tells their gateways."""

from __future__ import annotations

from dataclasses import dataclass

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError
from baton.services.core.request import Request
from baton.services.core.scheduler.base import RequestUpdate
from baton.services.runtime import convert
from baton.services.runtime.token_columns import TokenRow
from baton.services.worker.session import PlainTokens, Session


def scheduler_id(request_id: str, attempt: int) -> str:
    """The name of one attempt inside a worker: the next attempt may arrive before the last one is cleared away."""
    return f"{request_id}#{attempt}"


def split_scheduler_id(name: str) -> tuple[str, int]:
    """What ``scheduler_id`` was made from; attempt 0 for a name that it did not make."""
    request_id, separator, attempt = name.rpartition("#")
    return (request_id, int(attempt)) if separator and attempt.isdecimal() else (name, 0)


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """One attempt at one request on this worker, from its start command to its last output."""

    session: Session
    request_id: str
    attempt: int
    request: Request
    handle: int = 0  # by which its gateway knows it in columns; 0: it does not know columns

    @property
    def id(self) -> str:
        return self.request.request_id

    def output(self, update: RequestUpdate) -> pb.RequestOutput | PlainTokens:
        """What ``update`` means to the gateway."""
        if self.handle and _is_plain(update):
            token_ids = [token.token_id for token in update.new_tokens]
            return PlainTokens(self.request_id, self.attempt, TokenRow(self.handle, update.first_index, token_ids))
        output = pb.RequestOutput(
            request_id=self.request_id,
            attempt=self.attempt,
            first_index=update.first_index,
            tokens=[convert.token_to_wire(token) for token in update.new_tokens],
        )
        if update.finished:
            output.finish_reason = convert.finish_reason_to_wire(self.request.finish_reason)
            if self.request.stop_token_id is not None:
                output.stop_token_id = self.request.stop_token_id
        if update.prefill is not None:
            output.prefill.cached_tokens = update.prefill.num_cached_tokens
            output.prefill.queue_ms = update.prefill.queue_s * 1e3
            output.prefill.prefill_ms = update.prefill.prefill_s * 1e3
        if update.prompt_logprobs is not None:
            prompt = zip(self.request.token_ids, update.prompt_logprobs, strict=False)
            output.prompt_tokens.extend(convert.logprobs_to_wire(token_id, logprobs) for token_id, logprobs in prompt)
        return output

    def failure(self, error: BatonError) -> pb.RequestOutput:
        return failure_output(self.request_id, self.attempt, error)


def _is_plain(update: RequestUpdate) -> bool:
    """New tokens are all there is to say: so it is with nearly all updates of a decode worker."""
    if update.finished or update.prefill is not None or update.prompt_logprobs is not None:
        return False
    return bool(update.new_tokens) and all(token.logprobs is None for token in update.new_tokens)


def failure_output(request_id: str, attempt: int, error: BatonError) -> pb.RequestOutput:
    """The last word on a request that failed, or that was never taken in."""
    return pb.RequestOutput(
        request_id=request_id,
        attempt=attempt,
        finish_reason=pb.FINISH_REASON_ERROR,
        error=convert.error_to_wire(error),
    )
