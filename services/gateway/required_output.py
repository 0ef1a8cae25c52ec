"""All that an output must match: the answer that was asked for, calls of tools, and thoughts before either."""

from __future__ import annotations

import re

from baton.services.gateway.grammar import Grammar
from baton.services.gateway.limits import Limits
from baton.services.gateway.options import GenerationOptions
from baton.services.gateway.reasoning import Markers
from baton.services.gateway.tokenizer import ModelTokenizer

# Tokens at the end of a prompt in which thoughts may be opened, or opened and closed, by its template.
TAIL_TOKENS = 24


def is_thinking(markers: Markers | None, tail: str) -> bool | None:
    """Whether a prompt that ends with ``tail`` has opened thoughts; None where it has closed them, or there are none."""
    if markers is None:
        return None
    opened, closed = tail.rfind(markers.opening), tail.rfind(markers.closing)
    if closed > opened and not tail[closed + len(markers.closing) :].strip():
        return None
    return opened >= 0 and not tail[opened + len(markers.opening) :].strip()


def required_output(
    options: GenerationOptions, tokenizer: ModelTokenizer, limits: Limits, thinking: bool | None
) -> Grammar | None:
    """None: anything goes. ``thinking``: see ``is_thinking``."""
    reading, answer = options.reading, options.grammar
    offer, tool_format = reading.tools, reading.tool_format
    target = answer
    if offer is not None and tool_format is not None and (offer.must_call or answer is not None):
        calls = tool_format.grammar(offer, limits, tokenizer.rule_of, "baton_calls")
        if answer is None or offer.must_call:
            target = calls
        else:
            target = answer.behind("baton_either", f"start: @{answer.name} | @baton_calls", calls)
    if target is None or thinking is None or reading.markers is None:
        return target
    return _behind_thoughts(target, reading.markers, tokenizer, is_open=thinking)


def _behind_thoughts(target: Grammar, markers: Markers, tokenizer: ModelTokenizer, *, is_open: bool) -> Grammar:
    """Thoughts are free text up to their closing marker, which is the first there is."""
    closing = tokenizer.rule_of(markers.closing)
    if closing.startswith("<["):
        thought = f"thought: /(.|\\n)*/ {closing}"
    else:
        pattern = re.escape(markers.closing).replace("/", "\\/")
        thought = f"thought[lazy]: /(.|\\n)*{pattern}/"
    rest = f"@{target.name}"
    begins = "thought space?" if is_open else f"({tokenizer.rule_of(markers.opening)} thought space?)?"
    rules = f"start: {begins} {rest}\n{thought}\nspace: /[ \\n\\r\\t]{{1,8}}/"
    return target.behind("baton_thoughts", rules)
