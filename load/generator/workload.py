"""What a run is going to send: conversations of one or more turns, each with its moment, lengths and parts. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.load.generator.prompts import Part, block_parts
from baton.load.generator.traces import TraceRow


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. What it adds to the conversation so far, and how long after the answer before it is sent."""

    parts: tuple[Part, ...]
    output_len: int
    pause_s: float = 0.0

    @property
    def input_len(self) -> int:
        return sum(part.num_tokens for part in self.parts)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, of which the first is sent ``at_s`` seconds after the start, whatever the server does."""

    index: int
    at_s: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of a made-up workload, in tokens. ``spread`` 0.5 draws evenly from half to one and a half of them."""

    input_len: int
    output_len: int
    prefix_len: int = 0  # of every first prompt the same, on top of input_len
    spread: float = 0.0
    turn_input_len: int = 64  # of each later turn
    num_turns: int = 1
    pause_s: float = 0.0  # mean of the exponential pause before a later turn


def made_up(times_s: Sequence[float], lengths: Lengths, rng: random.Random) -> list[Conversation]:
    """Conversations that share nothing but the prefix."""
    return [Conversation(index, at_s, tuple(_made_up_turns(index, lengths, rng))) for index, at_s in enumerate(times_s)]


def from_trace(
    rows: Sequence[TraceRow],
    times_s: Sequence[float] | None,
    *,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
) -> list[Conversation]:
    """One conversation of one turn for each row, at the trace's own times unless others are given."""
    conversations = []
    for index, row in enumerate(rows):
        input_len = min(row.input_len, max_input_len or row.input_len)
        output_len = min(row.output_len, max_output_len or row.output_len)
        if row.hash_ids:
            parts = block_parts(row.hash_ids, row.block_size, input_len)
        else:
            parts = [Part(("request", index, 0), input_len)]
        at_s = row.at_s if times_s is None else times_s[index]
        conversations.append(Conversation(index, at_s, (Turn(tuple(parts), output_len),)))
    return conversations


def until(conversations: Sequence[Conversation], duration_s: float) -> list[Conversation]:
    """Those that begin before ``duration_s``."""
    return [one for one in conversations if one.at_s < duration_s]


def num_requests(conversations: Sequence[Conversation]) -> int:
    return sum(len(conversation.turns) for conversation in conversations)


def _made_up_turns(index: int, lengths: Lengths, rng: random.Random) -> Iterator[Turn]:
    for number in range(lengths.num_turns):
        mean = lengths.turn_input_len if number else lengths.input_len
        parts = [Part(("request", index, number), _around(mean, lengths.spread, rng))]
        if lengths.prefix_len and not number:
            parts.insert(0, Part("prefix", lengths.prefix_len))
        pause_s = rng.expovariate(1.0 / lengths.pause_s) if number and lengths.pause_s else 0.0
        yield Turn(tuple(parts), _around(lengths.output_len, lengths.spread, rng), pause_s)


def _around(mean: int, spread: float, rng: random.Random) -> int:
    return max(1, round(mean * rng.uniform(1.0 - spread, 1.0 + spread))) if spread else mean
