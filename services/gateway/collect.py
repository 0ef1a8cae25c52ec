"""All pieces of a generation put together, for answers that are not streamed."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field

from baton.services.core.request import TokenLogprobs
from baton.services.gateway.choice import OutputToken
from baton.services.gateway.parts import Part
from baton.services.gateway.pipeline import Generation


@dataclass(slots=True)
class CollectedChoice:
    """One whole choice."""

    index: int
    texts: list[str] = field(default_factory=list)
    tokens: list[OutputToken] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    prompt_text: str = ""
    parts: list[Part] | None = None  # what the text says, where it is more than content

    @property
    def text(self) -> str:
        return "".join(self.texts)


async def collect(generation: Generation) -> list[CollectedChoice]:
    """Runs a generation to its end; choices in order of their index. Failures are raised as BatonError."""
    choices = [CollectedChoice(index) for index in range(generation.options.num_choices)]
    async with aclosing(generation.stream()) as pieces:
        async for piece in pieces:
            choice = choices[piece.choice_index]
            choice.texts.append(piece.text)
            if piece.parts is not None:
                choice.parts = [*(choice.parts or ()), *piece.parts]
            choice.tokens.extend(piece.tokens)
            choice.finish_reason = piece.finish_reason
            choice.stop_reason = piece.stop_reason
            if piece.is_first:
                choice.prompt_logprobs, choice.prompt_text = piece.prompt_logprobs, piece.prompt_text
    return choices
