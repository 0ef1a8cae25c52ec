"""Which tokens a grammar allows next, for each row of a batch.

A row's state follows from its request's output tokens alone, so it is the same after a preemption, on the worker that the
request was handed to, and on one that resumes it. What is kept from step to step only saves time. Masks are computed on
another thread while the model computes the logits that they are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import Request
from baton.services.engine.grammar import GrammarCompiler, GrammarError, first_line


@dataclass(slots=True)
class MaskedRows:
    """Rows of the logits that have a mask, and the requests that cannot go on."""

    rows: list[int] = field(default_factory=list)
    bits: torch.Tensor | None = None  # [rows, ceil(vocab_size / 32)] int32, little end first
    failed: dict[str, BatonError] = field(default_factory=dict)  # by request id

    def apply(self, logits: torch.Tensor, original: torch.Tensor) -> None:
        """Forbids in ``logits`` [*, vocab_size], in place, what no mask allows. A grammar wins over a ban on ending: where
        nothing is left, what it allows is as likely as in ``original``."""
        if not self.rows or self.bits is None:
            return
        rows = torch.tensor(self.rows, device=logits.device)
        allowed = _unpack(self.bits.to(logits.device), logits.shape[1])
        masked = logits[rows].masked_fill_(~allowed, -torch.inf)
        is_dead = masked.amax(dim=1, keepdim=True).isneginf()
        rescued = original[rows].to(masked.dtype).masked_fill_(~allowed, -torch.inf)
        logits[rows] = torch.where(is_dead, rescued, masked)


class _RowState:
    """Where one request stands in its grammar."""

    __slots__ = ("is_own", "matcher", "num_consumed")

    def __init__(self, matcher: Any, *, is_own: bool) -> None:
        self.matcher = matcher
        self.is_own = is_own  # shares nothing with other requests
        self.num_consumed = 0

    def advance(self, request: Request) -> str | None:
        """Takes in the output tokens that came since the last call; what is wrong with them."""
        start = request.num_prompt_tokens + self.num_consumed
        tokens = request.token_ids[start:]
        if tokens and not self.matcher.consume_tokens(tokens):
            return first_line(self.matcher.get_error())
        self.num_consumed += len(tokens)
        return None

    def fill(self, row: npt.NDArray[np.int32]) -> str | None:
        """The next token's mask; what is wrong with it."""
        self.matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self.matcher.is_error():
            return first_line(self.matcher.get_error())
        return None if row.any() else "nothing can follow"


class TokenMasks:
    """Remembers the states of the last call's requests only, so nothing has to be freed. One thread calls."""

    def __init__(self, compiler: GrammarCompiler, vocab_size: int) -> None:
        self._compiler = compiler
        self._num_words = -(-vocab_size // 32)
        self._states: dict[Request, _RowState] = {}

    def begin(self, requests: Sequence[Request]) -> Future[MaskedRows] | None:
        """Starts on the masks of those that have a grammar; None where nobody has."""
        constrained = [(row, request) for row, request in enumerate(requests) if request.sampling.grammar is not None]
        if not constrained:
            self._states = {}
            return None
        return self._compiler.submit(lambda: self._compute(constrained))

    def _compute(self, constrained: list[tuple[int, Request]]) -> MaskedRows:
        previous, self._states = self._states, {}
        bits = np.zeros((len(constrained), self._num_words), dtype=np.int32)
        result = MaskedRows()
        for index, (row, request) in enumerate(constrained):
            try:
                self._states[request] = self._fill(request, previous.get(request), bits[index])
            except BaseException as error:  # a panic in Rust is no Exception; one request's must not be the batch's
                if not isinstance(error, BatonError):
                    error = BatonError(ErrorCode.INTERNAL, f"a grammar failed: {error!r}")
                result.failed[request.request_id] = error
                bits[index] = -1  # drawn like any other row, and dropped
            result.rows.append(row)
        result.bits = torch.from_numpy(bits)
        return result

    def _fill(self, request: Request, state: _RowState | None, row: npt.NDArray[np.int32]) -> _RowState:
        grammar, eos_token_ids = request.sampling.grammar or "", request.sampling.eos_token_ids
        if state is None:
            state = _RowState(self._compiler.shared(grammar, eos_token_ids).deep_copy(), is_own=False)
        problem = state.advance(request) or state.fill(row)
        if problem is not None and not state.is_own:
            # Others may have used up what the copies share; by itself the request may well go on.
            self._compiler.forget(grammar, eos_token_ids)
            state = _RowState(self._compiler.compile(grammar, eos_token_ids), is_own=True)
            problem = state.advance(request) or state.fill(row)
        if problem is not None:
            raise GrammarError(f"the grammar cannot be followed after {request.num_output_tokens} tokens: {problem}")
        return state


def _unpack(bits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[rows, words] int32 -> [rows, vocab_size] bool."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)[:, :vocab_size]
