"""What a request asks for in time: ``slo`` in its body, else the ``x-slo-*`` headers, else its class's targets."""

from __future__ import annotations

from collections.abc import Mapping

from baton.services.core.slo import SloClass
from baton.services.gateway.generation import SloTarget
from baton.services.gateway.openai_models import SloBody
from baton.services.gateway.validation import check_range, invalid

MAX_TARGET_MS = 24 * 3600 * 1000.0


def parse_slo(headers: Mapping[str, str], body: SloBody | None) -> SloTarget:
    """The targets of a request. Raises INVALID_REQUEST naming the header or field. Header names are lower case."""
    slo_class, ttft_ms, tpot_ms = (body.class_, body.ttft_ms, body.tpot_ms) if body else (None, None, None)
    if slo_class is not None and slo_class not in list(SloClass):
        raise invalid("slo.class", f"must be one of {', '.join(SloClass)}")
    check_range("slo.ttft_ms", ttft_ms, 0, MAX_TARGET_MS, above_low=True)
    check_range("slo.tpot_ms", tpot_ms, 0, MAX_TARGET_MS, above_low=True)
    header_ttft_ms = _milliseconds(headers, "x-slo-ttft-ms")
    header_tpot_ms = _milliseconds(headers, "x-slo-tpot-ms")
    return SloTarget(
        slo_class=slo_class or SloTarget().slo_class,
        ttft_ms=header_ttft_ms if ttft_ms is None else ttft_ms,
        tpot_ms=header_tpot_ms if tpot_ms is None else tpot_ms,
    )


def _milliseconds(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text) if len(text) <= 32 else float("nan")
    except ValueError:
        raise invalid(name, "must be a number of milliseconds") from None
    check_range(name, value, 0, MAX_TARGET_MS, above_low=True)
    return value
