"""Core types <-> wire messages. The one place where both are known."""

from __future__ import annotations

import math
from collections.abc import Iterable

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, Request, SampledToken, SamplingParams, TokenLogprobs
from baton.services.core.router import Role
from baton.services.core.sessions import SessionTag
from baton.services.core.slo import MAX_WEIGHT, MIN_WEIGHT, ServiceLevel, SloClass

# The limits of common.proto.
MAX_REQUEST_ID_CHARS = 128
MAX_LOGPROBS = 20
MAX_GRAMMAR_BYTES = 512 * 1024
MAX_TENANT_CHARS = 128
MAX_SESSION_KEY_CHARS = 256
MAX_SESSION_TTL_S = 86400.0
_MAX_INT32 = 2**31 - 1  # what the sampling kernels count in

_FINISH_TO_WIRE = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}

_ROLE_TO_WIRE = {
    Role.PREFILL: pb.WORKER_ROLE_PREFILL,
    Role.DECODE: pb.WORKER_ROLE_DECODE,
    Role.COLOCATED: pb.WORKER_ROLE_COLOCATED,
}
_ROLE_FROM_WIRE = {wire: role for role, wire in _ROLE_TO_WIRE.items()}

_CLASS_TO_WIRE = {
    SloClass.INTERACTIVE: pb.REQUEST_CLASS_INTERACTIVE,
    SloClass.STANDARD: pb.REQUEST_CLASS_STANDARD,
    SloClass.BATCH: pb.REQUEST_CLASS_BATCH,
}
_CLASS_FROM_WIRE = {wire: slo_class for slo_class, wire in _CLASS_TO_WIRE.items()}

STATE_NAMES = {
    pb.WORKER_STATE_UNSPECIFIED: "unknown",
    pb.WORKER_STATE_STARTING: "starting",
    pb.WORKER_STATE_READY: "ready",
    pb.WORKER_STATE_DRAINING: "draining",
    pb.WORKER_STATE_UNHEALTHY: "unhealthy",
}


def finish_reason_to_wire(reason: FinishReason | None) -> pb.FinishReason:
    return pb.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_TO_WIRE[reason]


def finish_reason_from_wire(wire: pb.FinishReason) -> FinishReason | None:
    return _FINISH_FROM_WIRE.get(wire)


def role_to_wire(role: Role) -> pb.WorkerRole:
    return _ROLE_TO_WIRE[role]


def role_from_wire(wire: pb.WorkerRole) -> Role | None:
    """None for a role that this version does not know: such a worker is not used."""
    return _ROLE_FROM_WIRE.get(wire)


def sampling_to_wire(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
        seed=params.seed,
        stop_token_ids=sorted(params.stop_token_ids),
        eos_token_ids=sorted(params.eos_token_ids),
        ignore_eos=params.ignore_eos,
        min_tokens=params.min_tokens,
        num_logprobs=params.num_logprobs,
        num_prompt_logprobs=params.num_prompt_logprobs,
        grammar=params.grammar,
    )


def sampling_from_wire(wire: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=wire.max_tokens,
        temperature=wire.temperature,
        top_k=wire.top_k,
        top_p=wire.top_p,
        min_p=wire.min_p,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        repetition_penalty=wire.repetition_penalty,
        logit_bias=tuple(sorted(wire.logit_bias.items())),
        seed=wire.seed,
        stop_token_ids=frozenset(wire.stop_token_ids),
        eos_token_ids=frozenset(wire.eos_token_ids),
        ignore_eos=wire.ignore_eos,
        min_tokens=wire.min_tokens,
        num_logprobs=wire.num_logprobs if wire.HasField("num_logprobs") else None,
        num_prompt_logprobs=wire.num_prompt_logprobs if wire.HasField("num_prompt_logprobs") else None,
        grammar=wire.grammar if wire.HasField("grammar") else None,
    )


def service_to_wire(level: ServiceLevel, now_s: float) -> pb.ServiceLevel:
    """Clocks of machines have nothing in common: what goes over the wire is the time that is left."""
    due_s = level.next_token_due_s
    return pb.ServiceLevel(
        request_class=_CLASS_TO_WIRE[level.slo_class],
        ttft_left_ms=None if due_s is None else (due_s - now_s) * 1e3,
        tpot_ms=(level.tpot_s or 0.0) * 1e3,
        tenant=level.tenant,
        weight=level.weight,
        priority=level.priority,
    )


def service_from_wire(wire: pb.ServiceLevel, now_s: float) -> ServiceLevel:
    """A class of a newer release is taken for standard. Raises BatonError(INVALID_REQUEST) for values out of range."""
    has_ttft = wire.HasField("ttft_left_ms")
    _check(not has_ttft or math.isfinite(wire.ttft_left_ms), "service.ttft_left_ms", "finite")
    _check(0.0 <= wire.tpot_ms < math.inf, "service.tpot_ms", "at least 0 and finite")
    _check(len(wire.tenant) <= MAX_TENANT_CHARS, "service.tenant", f"at most {MAX_TENANT_CHARS} characters")
    weight = wire.weight or 1.0
    _check(MIN_WEIGHT <= weight <= MAX_WEIGHT, "service.weight", f"{MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
    return ServiceLevel(
        slo_class=_CLASS_FROM_WIRE.get(wire.request_class, SloClass.STANDARD),
        next_token_due_s=now_s + wire.ttft_left_ms / 1e3 if has_ttft else None,
        tpot_s=wire.tpot_ms / 1e3 or None,
        tenant=wire.tenant,
        weight=weight,
        priority=wire.priority,
    )


def session_to_wire(tag: SessionTag | None) -> pb.SessionTag | None:
    return None if tag is None else pb.SessionTag(key=tag.key, ttl_ms=max(1, round(tag.ttl_s * 1e3)))


def session_from_wire(spec: pb.GenerationSpec) -> SessionTag | None:
    """Raises BatonError(INVALID_REQUEST) for values out of range."""
    if not spec.HasField("session"):
        return None
    check_session_key(spec.session.key, "session.key")
    ttl_s = spec.session.ttl_ms / 1e3
    _check(0.0 < ttl_s <= MAX_SESSION_TTL_S, "session.ttl_ms", f"1 to {MAX_SESSION_TTL_S * 1e3:g}")
    return SessionTag(spec.session.key, ttl_s)


def check_session_key(key: str, field: str = "key") -> str:
    """``key``, if it can be a session's. Raises BatonError(INVALID_REQUEST)."""
    _check(1 <= len(key) <= MAX_SESSION_KEY_CHARS, field, f"1 to {MAX_SESSION_KEY_CHARS} characters")
    return key


def request_from_wire(spec: pb.GenerationSpec, now_s: float, vocab_size: int) -> Request:
    """The scheduler's request. Raises BatonError(INVALID_REQUEST) for what no gateway of ours sends: a value that fails
    in the engine would fail every other request of its batch."""
    _check(1 <= len(spec.request_id) <= MAX_REQUEST_ID_CHARS, "request_id", f"1 to {MAX_REQUEST_ID_CHARS} characters")
    _check(spec.attempt >= 1, "attempt", "at least 1")
    _check(1 <= spec.num_prompt_tokens <= len(spec.token_ids), "num_prompt_tokens", "1 to the number of token_ids")
    _check(max(spec.token_ids) < vocab_size, "token_ids", f"each below the vocabulary size, {vocab_size}")
    sampling = sampling_from_wire(spec.sampling)
    _check_sampling(sampling, vocab_size)
    return Request(
        request_id=spec.request_id,
        attempt=spec.attempt,
        token_ids=list(spec.token_ids),
        num_prompt_tokens=spec.num_prompt_tokens,
        sampling=sampling,
        cache_salt=spec.cache_salt,
        arrival_s=now_s,
        deadline_s=now_s + spec.deadline_ms / 1e3 if spec.deadline_ms else None,
        service=service_from_wire(spec.service, now_s),
        session=session_from_wire(spec),
    )


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """The ranges of common.proto. No comparison holds for NaN, so all of them refuse it."""
    _check(params.max_tokens >= 1, "sampling.max_tokens", "at least 1")
    _check(params.min_tokens <= params.max_tokens, "sampling.min_tokens", "at most max_tokens")
    _check(0.0 <= params.temperature <= 2.0, "sampling.temperature", "0 to 2")
    _check(params.top_k <= _MAX_INT32, "sampling.top_k", f"at most {_MAX_INT32}")
    _check(0.0 < params.top_p <= 1.0, "sampling.top_p", "above 0, at most 1")
    _check(0.0 <= params.min_p <= 1.0, "sampling.min_p", "0 to 1")
    _check(-2.0 <= params.presence_penalty <= 2.0, "sampling.presence_penalty", "-2 to 2")
    _check(-2.0 <= params.frequency_penalty <= 2.0, "sampling.frequency_penalty", "-2 to 2")
    _check(0.0 < params.repetition_penalty < math.inf, "sampling.repetition_penalty", "above 0 and finite")
    _check(_are_known((token for token, _ in params.logit_bias), vocab_size), "sampling.logit_bias", "known token ids")
    _check(all(-100.0 <= bias <= 100.0 for _, bias in params.logit_bias), "sampling.logit_bias", "-100 to 100")
    for field, count in (("num_logprobs", params.num_logprobs), ("num_prompt_logprobs", params.num_prompt_logprobs)):
        _check((count or 0) <= MAX_LOGPROBS, f"sampling.{field}", f"at most {MAX_LOGPROBS}")
    grammar_bytes = len((params.grammar or "").encode())
    _check(grammar_bytes <= MAX_GRAMMAR_BYTES, "sampling.grammar", f"at most {MAX_GRAMMAR_BYTES} bytes")


def _are_known(token_ids: Iterable[int], vocab_size: int) -> bool:
    return all(0 <= token_id < vocab_size for token_id in token_ids)


def _check(holds: bool, field: str, expected: str) -> None:
    if not holds:
        raise BatonError(ErrorCode.INVALID_REQUEST, f"{field} must be {expected}", param=field)


def token_to_wire(token: SampledToken) -> pb.Token:
    return logprobs_to_wire(token.token_id, token.logprobs)


def logprobs_to_wire(token_id: int, logprobs: TokenLogprobs | None) -> pb.Token:
    if logprobs is None:
        return pb.Token(token_id=token_id)
    top = [pb.Logprob(token_id=other, logprob=logprob) for other, logprob in logprobs.top]
    return pb.Token(token_id=token_id, logprob=logprobs.logprob, top_logprobs=top)


def token_from_wire(wire: pb.Token) -> SampledToken:
    return SampledToken(wire.token_id, logprobs_from_wire(wire))


def logprobs_from_wire(wire: pb.Token) -> TokenLogprobs | None:
    if not wire.HasField("logprob"):
        return None
    return TokenLogprobs(wire.logprob, tuple((top.token_id, top.logprob) for top in wire.top_logprobs))


def error_to_wire(error: BatonError) -> pb.ErrorDetail:
    return pb.ErrorDetail(
        code=error.code.value,
        message=error.message,
        param=error.param or "",
        retryable=error.retryable,
        cause=error.cause or "",
    )


def error_from_wire(wire: pb.ErrorDetail) -> BatonError:
    try:
        code = ErrorCode(wire.code)
    except ValueError:  # a newer worker's code
        code = ErrorCode.INTERNAL
    return BatonError(code, wire.message, param=wire.param or None, retryable=wire.retryable, cause=wire.cause or None)
