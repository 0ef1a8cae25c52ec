"""From a client's body to GenerationOptions: every field that is wrong is named, with what it may be."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import SamplingParams
from baton.services.gateway.errors import invalid as invalid  # the rest of the gateway finds it here
from baton.services.gateway.grammar import Grammar
from baton.services.gateway.limits import Limits
from baton.services.gateway.openai_models import REFUSED, GenerationBody
from baton.services.gateway.options import GenerationOptions, Prompt
from baton.services.gateway.reading import Reading
from baton.services.gateway.served_model import ServedModel

B = TypeVar("B", bound=BaseModel)

# Below this, temperature divides by so little that logits overflow; 0 itself is greedy.
MIN_TEMPERATURE = 0.01
MAX_CACHE_SALT_CHARS = 1024
MAX_SESSION_ID_CHARS = 128
MAX_SESSION_TTL_S = 86400.0
DEFAULT_SESSION_TTL_S = 300.0
# OpenAI's words for how long; it writes the first one both ways.
RETENTIONS_S = {"in_memory": DEFAULT_SESSION_TTL_S, "in-memory": DEFAULT_SESSION_TTL_S, "24h": MAX_SESSION_TTL_S}
_MAX_REPORTED_PROBLEMS = 10
_MAX_LOGIT_BIAS = 100.0
_MAX_KNOWN_UNKNOWNS = 200
_known_unknowns: set[str] = set()
_log = structlog.get_logger(__name__)
_TYPE_WORDS = {
    "missing": "is required",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "finite_number": "must be finite",
}


def parse_body(kind: type[B], body: Any) -> B:
    """The body with its types checked. Raises INVALID_REQUEST naming the first field at fault, all in the message."""
    if not isinstance(body, dict):
        raise BatonError(ErrorCode.INVALID_REQUEST, "the body must be a JSON object")
    required: tuple[str, ...] = getattr(kind, "required", ())
    fields = {name: value for name, value in body.items() if value is not None or name in required}
    refused = (REFUSED - getattr(kind, "accepted", frozenset())) | getattr(kind, "refused", frozenset())
    for name in sorted(fields.keys() & refused):
        raise invalid(name, "is not supported by this server")
    for name in required:
        if fields.get(name) is None:
            raise invalid(name, "is required")
    try:
        parsed = kind.model_validate(fields)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        named = [(_path(problem["loc"]), _TYPE_WORDS.get(problem["type"], "has a wrong value")) for problem in problems]
        message = "; ".join(f"{name} {words}" for name, words in named[:_MAX_REPORTED_PROBLEMS])
        raise BatonError(ErrorCode.INVALID_REQUEST, message, param=named[0][0]) from None
    _warn_of_unknown(parsed)
    return parsed


def _warn_of_unknown(body: BaseModel) -> None:
    """Unknown fields do no harm, but whoever sent them may expect something: logged, once per name."""
    unknown = (body.model_extra or {}).keys() - _known_unknowns
    if unknown and len(_known_unknowns) < _MAX_KNOWN_UNKNOWNS:
        _known_unknowns.update(unknown)
        _log.warning("ignored unknown request fields", fields=sorted(_shown(name) for name in unknown)[:20])


def check_range(
    param: str, value: float | None, low: float, high: float = math.inf, *, above_low: bool = False
) -> None:
    """Raises INVALID_REQUEST unless ``value`` is None or finite and in the range; ``above_low``: excluding ``low``."""
    if value is None or (math.isfinite(value) and (low < value if above_low else low <= value) and value <= high):
        return
    least = f"above {low:g}" if above_low else f"at least {low:g}"
    words = f"{least} and finite" if math.isinf(high) else f"{least} and at most {high:g}"
    raise invalid(param, f"must be {words}, not {_shown(value)}")


def make_options(
    body: GenerationBody,
    prompts: tuple[Prompt, ...],
    *,
    prompt_param: str,
    model: ServedModel,
    limits: Limits,
    num_logprobs: int | None,
    max_tokens: int | None,
    max_tokens_param: str = "max_tokens",
    default_max_tokens: int | None = None,
    echo: bool = False,
    grammar: Grammar | None = None,
    reading: Reading | None = None,
) -> GenerationOptions:
    """Checks everything that chat, completions and gRPC share, and fills in the model's defaults."""
    name = model.resolve(body.model)
    n = 1 if body.n is None else body.n
    check_range("n", n, 1, limits.max_n)
    if len(prompts) * n > limits.max_choices:
        raise invalid("n", f"x prompts must be at most {limits.max_choices}, not {len(prompts) * n}")
    check_range(max_tokens_param, max_tokens, 0 if echo else 1)
    check_range("min_tokens", body.min_tokens, 0, math.inf if max_tokens is None else max_tokens)
    check_range("seed", body.seed, -(2**63), 2**63 - 1)
    check_range("priority", body.priority, -(2**31), 2**31 - 1)
    check_range("prompt_logprobs", body.prompt_logprobs, 0, limits.max_logprobs)
    must_call = reading is not None and reading.tools is not None and reading.tools.must_call
    if grammar is not None or must_call:
        _check_can_end(body, model)
    stream = bool(body.stream)
    if body.prompt_logprobs is not None and stream:
        raise invalid("prompt_logprobs", "cannot be streamed")
    if body.stream_options is not None and not stream:
        raise invalid("stream_options", "needs stream to be true")
    usage = body.stream_options
    include_usage = bool(usage and usage.include_usage)
    if usage and usage.continuous_usage_stats and not include_usage:
        raise invalid("stream_options.continuous_usage_stats", "needs stream_options.include_usage to be true")
    check_length("cache_salt", body.cache_salt, MAX_CACHE_SALT_CHARS)
    check_length("session_id", body.session_id, MAX_SESSION_ID_CHARS)
    check_range("session_ttl_s", body.session_ttl_s, 0, MAX_SESSION_TTL_S, above_low=True)
    prompt_logprobs = [k for k in (body.prompt_logprobs, num_logprobs if echo else None) if k is not None]
    return GenerationOptions(
        model=name,
        prompts=prompts,
        prompt_param=prompt_param,
        sampling=_sampling(body, model, limits, num_logprobs, max(prompt_logprobs, default=None)),
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        default_max_tokens=default_max_tokens,
        n=n,
        seed=None if body.seed == -1 else body.seed,
        stop=_stop_strings(body.stop, limits),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        echo=echo,
        prompt_logprobs=body.prompt_logprobs is not None,
        return_token_ids=bool(body.return_token_ids),
        grammar=grammar,
        reading=reading or Reading(),
        cache_salt=body.cache_salt,
        session_id=body.session_id,
        session_ttl_s=_session_ttl_s(body),
        priority=body.priority or 0,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=bool(usage and usage.continuous_usage_stats),
    )


def _session_ttl_s(body: GenerationBody) -> float:
    """How long the conversation's blocks are kept: by our own field, else OpenAI's."""
    retention = body.prompt_cache_retention
    if retention is not None and retention not in RETENTIONS_S:
        raise invalid("prompt_cache_retention", f"must be one of {', '.join(RETENTIONS_S)}")
    return body.session_ttl_s or RETENTIONS_S.get(retention or "", DEFAULT_SESSION_TTL_S)


def _check_can_end(body: GenerationBody, model: ServedModel) -> None:
    """An output under a grammar ends with the end of sequence, where the grammar is complete."""
    if body.ignore_eos:
        raise invalid("ignore_eos", "cannot be combined with a grammar, which says where the end is")
    if not model.eos_token_ids:
        raise invalid("structured_outputs", "needs a model with an end-of-sequence token")


def _sampling(
    body: GenerationBody, model: ServedModel, limits: Limits, num_logprobs: int | None, num_prompt_logprobs: int | None
) -> SamplingParams:
    defaults = model.defaults
    check_range("temperature", body.temperature, 0, 2)
    check_range("top_p", body.top_p, 0, 1, above_low=True)
    check_range("min_p", body.min_p, 0, 1)
    check_range("presence_penalty", body.presence_penalty, -2, 2)
    check_range("frequency_penalty", body.frequency_penalty, -2, 2)
    check_range("repetition_penalty", body.repetition_penalty, 0, above_low=True)
    check_range("top_k", body.top_k, -1)
    temperature = defaults.temperature if body.temperature is None else body.temperature
    top_k = defaults.top_k if body.top_k is None else body.top_k
    return SamplingParams(
        max_tokens=1,
        temperature=max(temperature, MIN_TEMPERATURE) if temperature > 0 else 0.0,
        top_k=min(max(top_k, 0), model.vocab_size),
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=defaults.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias, model, limits),
        stop_token_ids=_stop_token_ids(body.stop_token_ids, model, limits),
        eos_token_ids=model.eos_token_ids,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )


def check_length(param: str, text: str | None, max_chars: int) -> None:
    """Raises INVALID_REQUEST unless ``text`` is None or 1 to ``max_chars`` characters."""
    if text is not None and not 1 <= len(text) <= max_chars:
        raise invalid(param, f"must be 1 to {max_chars} characters, not {len(text)}")


def _stop_strings(stop: Any, limits: Limits) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise invalid("stop", "must be a string or a list of strings")
    if len(strings) > limits.max_stop_strings:
        raise invalid("stop", f"must be at most {limits.max_stop_strings} strings, not {len(strings)}")
    for string in strings:
        if not 1 <= len(string) <= limits.max_stop_chars:
            raise invalid("stop", f"strings must be 1 to {limits.max_stop_chars} characters, not {len(string)}")
    return tuple(dict.fromkeys(strings))


def _stop_token_ids(token_ids: list[int] | None, model: ServedModel, limits: Limits) -> frozenset[int]:
    if token_ids is None:
        return frozenset()
    if len(token_ids) > limits.max_stop_token_ids:
        raise invalid("stop_token_ids", f"must be at most {limits.max_stop_token_ids} ids, not {len(token_ids)}")
    check_token_ids("stop_token_ids", token_ids, model.vocab_size)
    return frozenset(token_ids)


def _logit_bias(biases: dict[str, float] | None, model: ServedModel, limits: Limits) -> tuple[tuple[int, float], ...]:
    if not biases:
        return ()
    if len(biases) > limits.max_logit_biases:
        raise invalid("logit_bias", f"must have at most {limits.max_logit_biases} entries, not {len(biases)}")
    bad = [key for key in biases if not (key.isascii() and key.isdigit() and len(key) <= 10)]
    if bad:
        raise invalid("logit_bias", f"keys must be token ids, not {', '.join(_shown(key) for key in bad[:5])}")
    by_id = {int(key): max(-_MAX_LOGIT_BIAS, min(_MAX_LOGIT_BIAS, bias)) for key, bias in biases.items()}
    check_token_ids("logit_bias", list(by_id), model.vocab_size)
    return tuple(sorted(by_id.items()))


def check_token_ids(param: str, token_ids: list[int], vocab_size: int) -> None:
    """Raises INVALID_REQUEST unless all ids are in the vocabulary."""
    low, high = min(token_ids, default=0), max(token_ids, default=0)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise invalid(param, f"has token id {_shown(bad)}, which is out of vocabulary (0 to {vocab_size - 1})")


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += (
            f"[{part}]" if isinstance(part, int) else f".{_shown(part, quote=False)}" if path else _shown(part, False)
        )
    return path or "body"


def _shown(value: object, quote: bool = True) -> str:
    text = f"{value:g}" if isinstance(value, float) else repr(value) if quote and isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
