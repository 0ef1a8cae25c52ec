"""``baton profile``: measures the workers behind a running gateway through its own API, for the next one to start from.

Prompts of growing length, each new so that no cache helps; streams beside each other in growing batches, over short and long
contexts; and what each handoff's receipt says of its transfer. Nothing else should be asked of the gateway meanwhile.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from baton.services.core.cost_fit import (
    fit_link,
    fit_steps,
    held_out_link_error,
    held_out_prefill_error,
    held_out_step_error,
    prefill_curve,
)
from baton.services.core.cost_model import DecodeCost
from baton.services.local.gateway_client import GatewayClient
from baton.services.local.gateway_command import Refused, checked, with_gateway

FORMAT = "baton-profile-1"
_ALPHABET = "The quick brown fox jumps over the lazy dog, 0123456789 times; why not? Pack my box with five dozen jugs!"
_TIMEOUT_S = 600.0
# A curve's last point should be the longest prompt, but a token must be left for the answer.
_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured. Lengths over what the workers serve are left out."""

    lengths: Sequence[int] = (16, 64, 256, 1024, 2048, 4096, 8192, 16384)
    batches: Sequence[int] = (1, 2, 4, 8, 16)
    contexts: Sequence[int] = (32, 512)
    repeats: int = 3


QUICK = Grid(lengths=(16, 48, 96, 512), batches=(1, 2, 4), contexts=(16, 64), repeats=2)


@dataclass(slots=True)
class Samples:
    """What was measured of one kind of worker, in seconds."""

    prefill: list[tuple[int, float]] = field(default_factory=list)  # tokens computed
    decode: list[tuple[int, float, float]] = field(default_factory=list)  # batch, context tokens of all, a step


class Profiler:
    """Asks one gateway. ``sent`` is called after every part of the grid."""

    def __init__(self, client: GatewayClient, grid: Grid, sent: Callable[[str], None] = lambda what: None) -> None:
        self._client = client
        self._grid = grid
        self._sent = sent
        self._random = random.Random(time.time_ns())  # noqa: S311  prompts that were never asked before
        self.pools: dict[str, Samples] = {}
        self.transfers: list[tuple[int, float]] = []
        model = checked(client.get("/v1/models"))["data"][0]
        self.model: str = model["id"]
        self._max_len = int(model["max_model_len"])
        tokens = checked(client.post("/tokenize", {"model": self.model, "prompt": _ALPHABET}))["tokens"]
        self._token_ids = sorted(set(tokens))
        if len(self._token_ids) < 8:
            raise Refused("has a tokenizer with too few tokens to make prompts that differ")

    def run(self) -> None:
        """Raises Refused and GatewayUnreachable."""
        self._ask(16, 2)  # the first request of a process is slower than any other
        longest = self._max_len - _ANSWER_TOKENS
        for length in [length for length in self._grid.lengths if length <= longest]:
            for _ in range(self._grid.repeats):
                self._take(self._ask(length, 2))  # a prompt with one token to come is not handed over
            self._sent(f"prompts of {length} tokens")
        for context in [context for context in self._grid.contexts if context <= longest]:
            for batch in self._grid.batches:
                for _ in range(self._grid.repeats):
                    self._take_steps(self._ask_together(batch, context), batch, context)
                self._sent(f"{batch} streams over {context} tokens")

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._random.choice(self._token_ids) for _ in range(num_tokens)]

    def _ask(self, num_tokens: int, max_tokens: int) -> dict[str, Any]:
        """The receipt."""
        body = {
            "model": self.model,
            "prompt": self._prompt(num_tokens),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = checked(self._client.post("/v1/completions", body))
        receipt: dict[str, Any] = checked(self._client.get(f"/v1/requests/{answer['id']}"))
        return receipt

    def _ask_together(self, batch: int, context: int) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(batch) as threads:
            return list(threads.map(lambda _: self._ask(context, _ANSWER_TOKENS), range(batch)))

    def _take(self, receipt: dict[str, Any]) -> None:
        decision = receipt["decision"]
        pool = "colocated" if decision["mode"] == "colocated" else "prefill" if decision["prefill"] else "decode"
        prefill_ms = receipt["phases_ms"]["prefill"]
        computed = receipt["prompt_tokens"] - receipt["cached_tokens"]
        if prefill_ms > 0 and computed > 0:
            self.pools.setdefault(pool, Samples()).prefill.append((computed, prefill_ms / 1e3))
        transfer = receipt["transfer"]
        if transfer is not None and transfer["bytes"] and transfer["duration_ms"] > 0:
            # What overlaps with computing hides bandwidth; what is left after the last block is the commit.
            self.transfers.append((transfer["bytes"], transfer["duration_ms"] / 1e3))

    def _take_steps(self, receipts: Sequence[dict[str, Any]], batch: int, context: int) -> None:
        """Streams that ran on one decode worker were one batch there, nearly all the time: they are as long as each other."""
        by_worker: dict[str, list[dict[str, Any]]] = {}
        for receipt in receipts:
            by_worker.setdefault(receipt["decision"]["decode"], []).append(receipt)
        for together in by_worker.values():
            steps_ms = [receipt["tpot_ms"] for receipt in together if receipt["tpot_ms"]]
            pool = "colocated" if together[0]["decision"]["mode"] == "colocated" else "decode"
            if steps_ms:
                num_tokens = len(together) * (context + _ANSWER_TOKENS / 2)
                step_s = statistics.median(steps_ms) / 1e3
                self.pools.setdefault(pool, Samples()).decode.append((len(together), num_tokens, step_s))


def run_profile(url: str, api_key: str | None, output: Path, grid: Grid) -> int:
    """Measures, prints a table, writes ``output``. Returns 0; 1 with words when the gateway cannot be measured."""
    console = Console()

    def use(client: GatewayClient) -> int:
        profiler = Profiler(client, grid, lambda what: console.print(f"measured: {what}", highlight=False))
        profiler.run()
        content = to_json(profiler, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.print(_table(content))
        console.print(f"written: {output}; baton serve --profile {output} starts from it", highlight=False)
        return 0

    return with_gateway("profile", url, api_key, use, timeout_s=_TIMEOUT_S)


def to_json(profiler: Profiler, date: str) -> dict[str, Any]:
    """What ``--profile`` reads, and the errors on what each fit had not seen."""
    pools: dict[str, Any] = {}
    for pool, samples in sorted(profiler.pools.items()):
        decode: DecodeCost | None = fit_steps(samples.decode) if samples.decode else None
        pools[pool] = {
            "prefill": [list(point) for point in prefill_curve(samples.prefill)],
            "prefill_held_out_error": held_out_prefill_error(samples.prefill),
            "decode": None if decode is None else asdict(decode),
            "decode_held_out_error": held_out_step_error(samples.decode),
            "samples": {"prefill": samples.prefill, "decode": samples.decode},
        }
    transfer: dict[str, Any] | None = None
    if profiler.transfers:
        transfer = {
            **asdict(fit_link(profiler.transfers)),
            "held_out_error": held_out_link_error(profiler.transfers),
            "samples": profiler.transfers,
        }
    return {"format": FORMAT, "date": date, "model": profiler.model, "pools": pools, "transfer": transfer}


def _table(content: dict[str, Any]) -> Table:
    table = Table("what", "measured", "held-out error")
    for what, measured, error in _rows(content):
        table.add_row(what, measured, "too few points" if error is None else f"{error:.1%}")
    return table


def _rows(content: dict[str, Any]) -> Iterator[tuple[str, str, float | None]]:
    for pool, part in content["pools"].items():
        if part["prefill"]:
            points = ", ".join(f"{tokens}: {seconds * 1e3:.1f} ms" for tokens, seconds in part["prefill"])
            yield f"{pool}: prompts by tokens", points, part["prefill_held_out_error"]
        decode = part["decode"]
        if decode is not None:
            line = (
                f"{decode['base_s'] * 1e3:.2f} ms + {decode['per_sequence_s'] * 1e3:.3f} ms a stream"
                f" + {decode['per_context_token_s'] * 1e6:.3f} ms per 1,000 tokens of context"
            )
            yield f"{pool}: a step", line, part["decode_held_out_error"]
    transfer = content["transfer"]
    if transfer is not None:
        line = f"{transfer['fixed_s'] * 1e3:.2f} ms + {transfer['bytes_per_s'] / 1e9:.2f} GB/s"
        yield "a transfer, beside computing", line, transfer["held_out_error"]
