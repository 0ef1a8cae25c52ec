"""Core types over the wire and back, and what a worker refuses to take from it."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, SampledToken, SamplingParams, TokenLogprobs
from baton.services.core.router import Role
from baton.services.core.sessions import SessionTag
from baton.services.core.slo import ServiceLevel, SloClass
from baton.services.runtime import convert

VOCAB_SIZE = 1000
token_ids = st.integers(0, VOCAB_SIZE - 1)


def float32s(low: float, high: float, *, exclude_min: bool = False) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, exclude_min=exclude_min)


sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(100, 2**32 - 1),
    temperature=float32s(0, 2),
    top_k=st.integers(0, 2**31 - 1),
    top_p=float32s(0, 1, exclude_min=True),
    min_p=float32s(0, 1),
    presence_penalty=float32s(-2, 2),
    frequency_penalty=float32s(-2, 2),
    repetition_penalty=float32s(0, 2, exclude_min=True),
    logit_bias=st.dictionaries(token_ids, float32s(-100, 100), max_size=5).map(lambda d: tuple(sorted(d.items()))),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.frozensets(st.integers(0, 2**32 - 1), max_size=5),
    eos_token_ids=st.frozensets(st.integers(0, 2**32 - 1), max_size=5),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 100),
    num_logprobs=st.none() | st.integers(0, 20),
    num_prompt_logprobs=st.none() | st.integers(0, 20),
)
logprobs = st.builds(
    TokenLogprobs,
    float32s(-9999, 0),
    st.lists(st.tuples(token_ids, float32s(-9999, 0)), max_size=4).map(tuple),
)


@given(sampling_params)
def test_sampling_survives_the_wire_and_is_taken(params: SamplingParams) -> None:
    wire = pb.SamplingParams.FromString(convert.sampling_to_wire(params).SerializeToString())
    assert convert.sampling_from_wire(wire) == params
    spec = pb.GenerationSpec(request_id="r", attempt=1, token_ids=[1], num_prompt_tokens=1, sampling=wire)
    assert convert.request_from_wire(spec, 0.0, VOCAB_SIZE).sampling == params


@given(st.builds(SampledToken, token_ids, st.none() | logprobs))
def test_a_token_survives_the_wire(token: SampledToken) -> None:
    wire = pb.Token.FromString(convert.token_to_wire(token).SerializeToString())
    assert convert.token_from_wire(wire) == token


@given(
    st.builds(
        BatonError,
        st.sampled_from(ErrorCode),
        st.text("ab\né"),
        param=st.none() | st.text("ab.", min_size=1),
        retryable=st.booleans(),
    )
)
def test_an_error_survives_the_wire(error: BatonError) -> None:
    back = convert.error_from_wire(pb.ErrorDetail.FromString(convert.error_to_wire(error).SerializeToString()))
    assert (back.code, back.message, back.param, back.retryable) == (
        error.code,
        error.message,
        error.param,
        error.retryable,
    )


def test_enums_of_both_sides_are_the_same_and_unknown_ones_are_told_apart() -> None:
    for reason in FinishReason:
        assert convert.finish_reason_from_wire(convert.finish_reason_to_wire(reason)) is reason
    assert convert.finish_reason_to_wire(None) == pb.FINISH_REASON_UNSPECIFIED
    for role in Role:
        assert convert.role_from_wire(convert.role_to_wire(role)) is role
    assert set(convert.STATE_NAMES) == set(pb.WorkerState.values())
    # What a newer version may send.
    assert convert.finish_reason_from_wire(77) is None  # type: ignore[arg-type]
    assert convert.role_from_wire(77) is None  # type: ignore[arg-type]
    assert convert.error_from_wire(pb.ErrorDetail(code="of_tomorrow", message="m")).code is ErrorCode.INTERNAL


def test_a_deadline_is_on_the_workers_own_clock() -> None:
    spec = make_spec()
    assert convert.request_from_wire(spec, 5.0, VOCAB_SIZE).deadline_s is None
    spec.deadline_ms = 1500
    request = convert.request_from_wire(spec, 5.0, VOCAB_SIZE)
    assert (request.arrival_s, request.deadline_s) == (5.0, 6.5)
    spec.deadline_ms = 2**64 - 1
    assert math.isfinite(convert.request_from_wire(spec, 5.0, VOCAB_SIZE).deadline_s or math.inf)


@pytest.mark.parametrize("slo_class", list(SloClass))
def test_a_promise_goes_over_the_wire_as_time_that_is_left(slo_class: SloClass) -> None:
    level = ServiceLevel(slo_class, next_token_due_s=101.5, tpot_s=0.125, tenant="t", weight=2.0, priority=-7)
    wire = convert.service_to_wire(level, 100.0)
    there = convert.service_from_wire(pb.ServiceLevel.FromString(wire.SerializeToString()), 7.0)
    assert there == ServiceLevel(slo_class, next_token_due_s=8.5, tpot_s=0.125, tenant="t", weight=2.0, priority=-7)
    late = convert.service_to_wire(ServiceLevel(next_token_due_s=99.0), 100.0)
    assert convert.service_from_wire(late, 7.0) == ServiceLevel(next_token_due_s=6.0)


def test_a_gateway_of_the_release_before_promises_nothing() -> None:
    assert convert.request_from_wire(make_spec(), 5.0, VOCAB_SIZE).service == ServiceLevel()
    newer = pb.ServiceLevel(request_class=77)  # type: ignore[arg-type]
    assert convert.service_from_wire(newer, 0.0).slo_class is SloClass.STANDARD


SERVICE_CASES = [
    *(("ttft_left_ms", value) for value in (math.nan, math.inf, -math.inf)),
    *(("tpot_ms", value) for value in (math.nan, math.inf, -1.0)),
    *(("weight", value) for value in (math.nan, math.inf, -1.0, 1e-4, 1001.0)),
    ("tenant", "t" * 129),
]


@pytest.mark.parametrize(("field", "value"), SERVICE_CASES)
def test_a_promise_that_would_spoil_the_order_of_a_queue_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(BatonError) as failure:
        convert.request_from_wire(make_spec(service=pb.ServiceLevel(**{field: value})), 0.0, VOCAB_SIZE)
    assert failure.value.param == f"service.{field}"


def make_spec(**fields: Any) -> pb.GenerationSpec:
    sampling = {"max_tokens": 8, "top_p": 1.0, "repetition_penalty": 1.0} | fields.pop("sampling", {})
    base = {"request_id": "r", "attempt": 1, "token_ids": [1, 2, 3], "num_prompt_tokens": 3}
    return pb.GenerationSpec(**(base | fields), sampling=pb.SamplingParams(**sampling))


SPEC_CASES = [
    ("request_id", ""),
    ("request_id", "x" * 129),
    ("attempt", 0),
    ("token_ids", [1, 2, VOCAB_SIZE]),
    ("token_ids", [2**32 - 1] * 3),
    ("num_prompt_tokens", 0),
    ("num_prompt_tokens", 4),
    ("num_prompt_tokens", 2**32 - 1),
]
SAMPLING_CASES = [
    ("max_tokens", 0),
    ("min_tokens", 9),
    ("top_k", 2**32 - 1),
    ("top_p", 0.0),
    *(
        (name, value)
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        for value in (math.nan, math.inf, -math.inf, -3.0)
    ),
    ("repetition_penalty", 0.0),
    *(("logit_bias", {1: value}) for value in (math.nan, math.inf, -math.inf, 100.5)),
    ("logit_bias", {VOCAB_SIZE: 1.0}),
    ("num_logprobs", 21),
    ("num_prompt_logprobs", 2**32 - 1),
]


@pytest.mark.parametrize(("field", "value"), SPEC_CASES)
def test_a_bad_spec_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(BatonError) as failure:
        convert.request_from_wire(make_spec(**{field: value}), 0.0, VOCAB_SIZE)
    assert (failure.value.code, failure.value.param) == (ErrorCode.INVALID_REQUEST, field)
    assert not failure.value.retryable


@pytest.mark.parametrize(("field", "value"), SAMPLING_CASES)
def test_sampling_that_would_break_a_batch_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(BatonError) as failure:
        convert.request_from_wire(make_spec(sampling={field: value}), 0.0, VOCAB_SIZE)
    assert failure.value.param == f"sampling.{field}"
    assert not failure.value.retryable


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    """What parses as a message is either taken or refused with our own error, never anything else."""
    spec = make_spec()
    try:
        spec.MergeFromString(data)
    except DecodeError:
        return  # gRPC answers that
    with suppress(BatonError):
        request = convert.request_from_wire(spec, 0.0, VOCAB_SIZE)
        assert 1 <= request.num_prompt_tokens <= request.num_tokens
        assert max(request.token_ids) < VOCAB_SIZE


def test_a_million_tokens_are_converted_at_once() -> None:
    """Their length is the scheduler's to refuse."""
    spec = make_spec(token_ids=[7] * 1_000_000)
    assert convert.request_from_wire(spec, 0.0, VOCAB_SIZE).num_tokens == 1_000_000


def test_messages_of_refusals_do_not_quote_the_prompt() -> None:
    secret = 912_345_678
    with pytest.raises(BatonError) as failure:
        convert.request_from_wire(make_spec(token_ids=[1, secret, 3]), 0.0, VOCAB_SIZE)
    assert str(secret) not in failure.value.message


def test_a_session_survives_the_wire_and_a_request_without_one_has_none() -> None:
    tag = SessionTag("tenant/name", 300.0)
    spec = pb.GenerationSpec(session=convert.session_to_wire(tag))
    assert convert.session_from_wire(pb.GenerationSpec.FromString(spec.SerializeToString())) == tag
    assert convert.session_from_wire(pb.GenerationSpec(session=convert.session_to_wire(None))) is None


@pytest.mark.parametrize(
    "session",
    [
        pb.SessionTag(ttl_ms=5),
        pb.SessionTag(key="k" * 257, ttl_ms=5),
        pb.SessionTag(key="k"),
        pb.SessionTag(key="k", ttl_ms=86_400_001),
    ],
)
def test_a_session_out_of_range_is_refused(session: pb.SessionTag) -> None:
    with pytest.raises(BatonError, match="session"):
        convert.session_from_wire(pb.GenerationSpec(session=session))
