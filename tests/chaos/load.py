"""The load: requests whose answers are known from an undisturbed run, and the clients that send them."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from chaos.client import Answer, Behaviour, stream
from helpers.oracle import make_prompt

_STOP_CHARS = 3


@dataclass(frozen=True)
class Shape:
    """What is asked for. Ranges are drawn from evenly, by ``seed``; shares are of the requests."""

    requests: int = 32
    streams: int = 32  # at once
    distinct: int | None = None  # requests that differ; then they repeat, under another salt. None: all
    prompt_tokens: tuple[int, int] = (8, 300)
    max_tokens: tuple[int, int] = (48, 96)
    sampled: float = 0.5  # the others are greedy
    stops: float = 0.0  # end at a stop string
    aborts: float = 0.0  # clients that hang up, at any moment
    abort_after_s: float = 0.4  # at most
    slow: float = 0.0  # clients that read slowly
    slow_bytes_per_s: float = 20_000.0
    deadline_s: float = 180.0  # for all of it; what has not ended by then is lost
    seed: int = 0

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Shape:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@dataclass(frozen=True)
class Ask:
    """One request, but for its salt."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None = None  # None: greedy
    stop: str | None = None

    def body(self, salt: str) -> dict[str, Any]:
        sampling: dict[str, Any] = {"temperature": 0.0}
        if self.seed is not None:
            sampling = {"temperature": 0.9, "top_p": 0.95, "seed": self.seed, "presence_penalty": 0.2}
        return {
            "model": "tiny",
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": salt,
            **sampling,
            **({"stop": [self.stop]} if self.stop is not None else {}),
        }


@dataclass(frozen=True)
class Expected:
    """What an undisturbed run answered."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass
class Exchange:
    """A request of a run, and its answer so far."""

    ask: Ask
    request_id: str
    behaviour: Behaviour
    answer: Answer = field(default_factory=Answer)
    is_lost: bool = False


class Reference:
    """The answers of undisturbed runs. Asked again for what is not known yet."""

    def __init__(self) -> None:
        self._answers: dict[Ask, Expected] = {}

    def __getitem__(self, ask: Ask) -> Expected:
        return self._answers[ask]

    async def record(self, url: str, asks: Sequence[Ask]) -> None:
        """Asks a cluster on which nothing is wrong. Raises when it fails all the same."""
        unknown = [ask for ask in dict.fromkeys(asks) if ask not in self._answers]
        exchanges = [Exchange(ask, f"reference-{len(self._answers) + i}", Behaviour()) for i, ask in enumerate(unknown)]
        await send_all(url, exchanges, salts=itertools.repeat("reference"), streams=16)
        for exchange in exchanges:
            answer = exchange.answer
            assert not answer.error, f"the undisturbed run failed: {answer.error}: {answer.message}"
            assert len(answer.finish_reasons) == 1
            self._answers[exchange.ask] = Expected(tuple(answer.token_ids), answer.text, answer.finish_reasons[0])

    async def make_asks(self, url: str, shape: Shape) -> list[Ask]:
        """The distinct requests of a shape, all with known answers."""
        rng = random.Random(f"{shape.seed}")
        number = min(shape.distinct or shape.requests, shape.requests)
        asks = [
            Ask(
                make_prompt(rng.randint(*shape.prompt_tokens), seed=shape.seed * 100_000 + i),
                rng.randint(*shape.max_tokens),
                seed=1000 + i if rng.random() < shape.sampled else None,
            )
            for i in range(number)
        ]
        await self.record(url, asks)
        stopped = [self._with_stop(ask) if rng.random() < shape.stops else ask for ask in asks]
        await self.record(url, stopped)
        return stopped

    def _with_stop(self, ask: Ask) -> Ask:
        """The same, to be stopped at a string that comes in the last third of its text."""
        text = self[ask].text
        middle = len(text) * 2 // 3
        candidates = (text[i : i + _STOP_CHARS] for i in range(middle, len(text) - _STOP_CHARS))
        stop = next((c for c in candidates if c.isascii() and c.isprintable()), None)
        return ask if stop is None else replace(ask, stop=stop)


def make_exchanges(shape: Shape, asks: Sequence[Ask], name: str) -> list[Exchange]:
    """All requests of a run; ``name`` is unique to it."""
    rng = random.Random(f"{shape.seed}/{name}")
    exchanges = []
    for i in range(shape.requests):
        behaviour = Behaviour()
        kind = rng.random()
        ask = asks[i % len(asks)]
        if kind < shape.aborts:
            if rng.random() < 0.5:
                behaviour.hang_up_after_s = rng.uniform(0.0, shape.abort_after_s)
            else:
                behaviour.hang_up_after_tokens = rng.randint(1, max(1, ask.max_tokens - 1))
        elif kind < shape.aborts + shape.slow:
            behaviour.bytes_per_s = shape.slow_bytes_per_s
        exchanges.append(Exchange(ask, f"{name}-{i}", behaviour))
    return exchanges


async def send_all(url: str, exchanges: Sequence[Exchange], *, salts: Any, streams: int) -> None:
    """Sends all, so many at once, in their order."""
    waiting = iter(list(zip(exchanges, salts, strict=False)))

    async def one_after_another() -> None:
        for exchange, salt in waiting:
            await stream(url, exchange.request_id, exchange.ask.body(salt), exchange.behaviour, exchange.answer)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(streams, len(exchanges))):
            group.create_task(one_after_another())


async def run_load(url: str, shape: Shape, exchanges: Sequence[Exchange], num_distinct: int, name: str) -> None:
    """Sends a run's load and marks what has no end by the deadline."""
    # Each round of the distinct requests has its own salt: none finds the blocks of another.
    salts = [f"{name}-{i // num_distinct}" for i in range(len(exchanges))]
    try:
        async with asyncio.timeout(shape.deadline_s):
            await send_all(url, exchanges, salts=salts, streams=shape.streams)
    except TimeoutError:
        for exchange in exchanges:
            answer = exchange.answer
            exchange.is_lost = not (answer.num_done or answer.error) and not _hung_up_itself(exchange)


def _hung_up_itself(exchange: Exchange) -> bool:
    behaviour = exchange.behaviour
    return exchange.answer.hung_up and (
        behaviour.hang_up_after_s is not None or behaviour.hang_up_after_tokens is not None
    )
