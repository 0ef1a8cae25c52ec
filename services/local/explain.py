"""``baton explain ID``: a request's receipt as a timeline, and why it went where it went."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from baton.services.local.gateway_client import GatewayClient
from baton.services.local.gateway_command import checked, with_gateway

_WIDTH = 48
_STYLES = {
    "admission": "bright_black",
    "tokenize": "cyan",
    "queue": "yellow",
    "prefill": "green",
    "transfer": "magenta",
    "decode_wait": "yellow",
    "first_token": "blue",
}
# What stretches a phase, for people who want it shorter.
_MENDS = {
    "admission": "the gateway was busy",
    "tokenize": "a long prompt, or a gateway that is busy",
    "queue": "prompts before it: another prefill worker, or a higher class",
    "prefill": "its own computing: a longer known prefix, or a faster prefill worker",
    "transfer": "the link between the workers: baton status shows its rate",
    "decode_wait": "a full decode batch: another decode worker",
    "first_token": "the decode step, and the way back to the gateway",
}
_GOOD_ENDS = ("stop", "length", "tool_calls")


def explain(url: str, api_key: str | None, request_id: str, *, as_json: bool) -> int:
    """Returns 0; 1 with words when there is no such receipt."""

    def show(client: GatewayClient) -> None:
        receipt = checked(client.get(f"/v1/requests/{quote(request_id, safe='')}"))
        if as_json:
            print(json.dumps(receipt, indent=2))
        else:
            console = Console()
            console.print(render(receipt, is_plain=not console.is_terminal))

    return with_gateway("explain", url, api_key, show)


def render(receipt: Mapping[str, Any], *, is_plain: bool) -> RenderableType:
    """Everything that a receipt says, for people. ``is_plain``: bars of ASCII."""
    lines = [*_head(receipt), ""]
    parts: list[RenderableType] = [Text("\n".join(lines))]
    if receipt["ttft_ms"] is not None:
        parts.append(_timeline_table(receipt, is_plain))
    parts.append(Text("\n".join(["", *_rest(receipt)])))
    if choices := receipt.get("choices"):
        parts += [Text(""), _choices_table(choices)]
    return Group(*parts)


def bars(phases_ms: Mapping[str, float], ttft_ms: float, width: int) -> list[tuple[str, int, int]]:
    """(phase, first column, columns) of each. They follow each other without gap or overlap and fill ``width``."""
    found, at_ms = [], 0.0
    for name, length_ms in phases_ms.items():
        first = round(at_ms / ttft_ms * width) if ttft_ms > 0 else 0
        at_ms += length_ms
        end = round(at_ms / ttft_ms * width) if ttft_ms > 0 else 0
        found.append((name, first, min(end, width) - first))
    return found


def verdict(receipt: Mapping[str, Any]) -> str:
    """Whether the service level was met, and which phase cost it where it was not."""
    slo, outcome = receipt["slo"], receipt["outcome"]
    targets = ", ".join(f"{name.upper()} {slo[f'{name}_ms']:g} ms" for name in ("ttft", "tpot") if slo[f"{name}_ms"])
    level = f"{slo['class']} ({targets or 'no targets'})"
    if outcome == "running":
        return f"{level}: not over yet"
    if slo["met"]:
        return f"{level}: met"
    if outcome not in _GOOD_ENDS:
        return f"{level}: missed, since the request ended with {outcome}"
    ttft_ms, tpot_ms = receipt["ttft_ms"], receipt["tpot_ms"]
    if slo["ttft_ms"] is not None and ttft_ms is not None and ttft_ms > slo["ttft_ms"]:
        phases = receipt["phases_ms"]
        longest = max(phases, key=lambda name: phases[name])
        share = phases[longest] / ttft_ms
        over = f"TTFT was {ttft_ms - slo['ttft_ms']:.1f} ms over"
        return f"{level}: missed; {over}, and {longest} took {share:.0%} of it: {_MENDS.get(longest, '')}"
    if slo["tpot_ms"] is not None and tpot_ms is not None:
        over = f"TPOT was {tpot_ms - slo['tpot_ms']:.1f} ms over"
        return f"{level}: missed; {over}: the decode batch was too large, or stalled"
    return f"{level}: missed"


def choice(decision: Mapping[str, Any]) -> str:
    """Why this placement and not the next best."""
    runner_up = decision.get("runner_up")
    if not runner_up:
        return "there was no other"
    gap_ms = runner_up["predicted_ttft_ms"] - decision["predicted_ttft_ms"]
    price = f"{_path(runner_up)}, predicted {runner_up['predicted_ttft_ms']:.1f} ms"
    if gap_ms > 0:
        return f"{price}: {gap_ms:.1f} ms slower"
    if gap_ms < 0:
        return f"{price}: {-gap_ms:.1f} ms faster, but not chosen: {decision['reason']}"
    return f"{price}: no faster"


def _head(receipt: Mapping[str, Any]) -> Iterator[str]:
    yield f"request    {receipt['id']}  ({receipt['model']}), {receipt['outcome']}"
    yield f"SLO        {verdict(receipt)}"
    decision = receipt["decision"]
    if decision is None:
        yield "placement  none: it did not come so far"
        return
    yield f"placement  {_path(decision)}: {decision['reason']}"
    yield f"runner-up  {choice(decision)}"


def _rest(receipt: Mapping[str, Any]) -> Iterator[str]:
    prompt, cached = receipt["prompt_tokens"], receipt["cached_tokens"]
    yield f"tokens     {prompt:,} prompt, {cached:,} of them cached; {receipt['completion_tokens']:,} completion"
    yield f"times      TTFT {_ms(receipt['ttft_ms'])}, TPOT {_ms(receipt['tpot_ms'])}, end to end {_ms(receipt['e2e_ms'])}"
    decision = receipt["decision"]
    if decision is not None and receipt["ttft_ms"] is not None:
        error = receipt["ttft_ms"] - decision["predicted_ttft_ms"]
        yield f"prediction TTFT {_ms(decision['predicted_ttft_ms'])}: {abs(error):.1f} ms {'later' if error > 0 else 'earlier'}"
    if transfer := receipt["transfer"]:
        yield (
            f"transfer   {transfer['blocks']:,} blocks, {transfer['bytes']:,} bytes over {transfer['path']} in "
            f"{_ms(transfer.get('duration_ms'))} ({transfer['gb_per_s']:g} GB/s), {transfer['checksum']}; "
            f"{transfer['blocks_skipped']:,} were there already; waited {_ms(transfer.get('reserve_wait_ms'))} for room"
        )
        if transfer.get("fallbacks"):
            yield f"           other transports first: {', '.join(transfer['fallbacks'])}"
    if fetch := receipt.get("fetch"):
        how = f"{fetch['blocks']:,} blocks, {fetch['bytes']:,} bytes in {_ms(fetch['duration_ms'])}"
        yield f"fetched    from {fetch['from']}: {fetch['error'] or how}"
    attempts = receipt["attempts"]
    if receipt["retries"] or len(attempts) > 1:
        yield f"retries    {receipt['retries']}"
        for attempt in attempts:
            yield f"  attempt {attempt['attempt']}  {_path(attempt)}: {attempt['outcome'] or 'under way'}"
    if receipt["fallbacks"]:
        yield f"fallbacks  {', '.join(receipt['fallbacks'])}"


def _timeline_table(receipt: Mapping[str, Any], is_plain: bool) -> Table:
    """A row for each phase; together the bars are as long as the time to first token."""
    ttft_ms = receipt["ttft_ms"]
    table = Table(show_header=False, box=None, padding=(0, 1), pad_edge=False)
    for justify in ("left", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    mark = "#" if is_plain else "\u2588"
    for name, first, columns in bars(receipt["phases_ms"], ttft_ms, _WIDTH):
        length_ms = receipt["phases_ms"][name]
        share = length_ms / ttft_ms if ttft_ms else 0.0
        # A phase that is too short for a column is seen where it was.
        text = mark * columns if columns else ("|" if length_ms > 0 else "")
        bar = Text(" " * min(first, _WIDTH - 1)) + Text(text, style="" if is_plain else _STYLES.get(name, ""))
        table.add_row(name, f"{length_ms:.2f} ms", f"{share:.0%}", bar)
    table.add_row("TTFT", f"{ttft_ms:.2f} ms", "100%", Text(("=" if is_plain else "\u2501") * _WIDTH))
    return table


def _choices_table(choices: list[dict[str, Any]]) -> Table:
    table = Table(title="choices", title_justify="left")
    for heading in ("request", "outcome", "tokens", "cached", "TTFT, ms"):
        table.add_column(heading)
    for one in choices:
        ttft = "" if one["ttft_ms"] is None else f"{one['ttft_ms']:.2f}"
        numbers = (str(one["completion_tokens"]), str(one["cached_tokens"]))
        table.add_row(one["request_id"], one["outcome"], *numbers, ttft)
    return table


def _path(placement: Mapping[str, Any]) -> str:
    if placement["prefill"]:
        return f"{placement['prefill']} -> {placement['decode']} ({placement['mode']})"
    return f"{placement['decode']} ({placement['mode']})"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} ms"
