"""Grammars that outputs must match: compiling them, and the tokenizer as llguidance needs it.

A grammar travels as text, in llguidance's own form: JSON with ``grammars``, or Lark. What this module makes of it is the
same in the gateway, which tries it out in a process that may die of it (``gateway/grammar_helper.py``), and in the worker.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from baton.services.core.errors import BatonError, ErrorCode

T = TypeVar("T")

# Fuel is llguidance's measure of work. A request that uses up the states of its lexer has taken some 10 MiB.
MAX_GRAMMAR_SYMBOLS = 100_000
MAX_LEXER_STATES = 10_000
_COMPILE_FUEL = 1_000_000
_STEP_FUEL = 200_000
_STEP_ITEMS = 50_000
# Compiled grammars that are kept for the next request with the same one. What took long to compile is large as well: so no
# more are kept than took so long together, and at least the last one.
_MAX_KEPT = 16
_MAX_KEPT_COMPILE_S = 0.25
# Compiling recurses. The gateway tries a grammar with a far smaller stack, so that what passed there fits here.
_STACK_BYTES = 64 << 20


class GrammarError(BatonError):
    """A grammar that cannot be used; the message is meant for whoever wrote it."""

    def __init__(self, problem: str) -> None:
        super().__init__(ErrorCode.INVALID_REQUEST, problem, param="structured_outputs")


def read_tokenizer(folder: Path) -> str:
    """The tokenizer.json of a model folder, without truncation and padding."""
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").exists():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str())


def make_tokenizer(tokenizer_json: str, vocab_size: int, eos_token_ids: frozenset[int]) -> Any:
    """llguidance's tokenizer, which takes some time and memory. Raises GrammarError for kinds that it does not know."""
    from llguidance import LLTokenizer

    if not eos_token_ids:
        raise GrammarError("structured outputs need a model with an end-of-sequence token")
    try:
        return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids))
    except ValueError as error:
        raise GrammarError("this model's kind of tokenizer cannot be used with structured outputs") from error


def compile_grammar(tokenizer: Any, grammar: str) -> Any:
    """A matcher at its beginning. Raises GrammarError."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=_COMPILE_FUEL,
        step_lexer_fuel=_STEP_FUEL,
        step_max_items=_STEP_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SYMBOLS,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, limits=limits, log_level=0)
    if matcher.is_error():
        raise GrammarError(first_line(matcher.get_error()))
    return matcher


def first_line(message: str) -> str:
    """What llguidance says, without the state of its parser."""
    return (message.strip().splitlines() or ["unknown"])[0][:300]


class _Kept(NamedTuple):
    """A compiled grammar, and how long that took."""

    matcher: Any
    compile_s: float


class GrammarCompiler:
    """Compiles for a worker, on a thread of its own. ``read``: the tokenizer, asked for when the first grammar comes."""

    def __init__(self, read: Callable[[], str], vocab_size: int) -> None:
        self._read = read
        self._vocab_size = vocab_size
        self._tokenizers: dict[frozenset[int], Any] = {}  # one: a model has one set of ends
        self._tokenizer_json: str | None = None
        self._kept: OrderedDict[tuple[str, frozenset[int]], _Kept] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Runs ``work`` on the thread, behind what is under way there."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
                usual = threading.stack_size(_STACK_BYTES)
                try:
                    self._pool.submit(int)  # the thread begins here, with this stack
                finally:
                    threading.stack_size(usual)
            return self._pool.submit(work)

    def prepare(self, grammar: str, eos_token_ids: frozenset[int]) -> Future[Any]:
        """Compiles ahead of need. Fails with GrammarError."""
        return self.submit(lambda: self.shared(grammar, eos_token_ids))

    def shared(self, grammar: str, eos_token_ids: frozenset[int]) -> Any:
        """The compiled grammar, kept for the next request: use copies. Raises GrammarError. On the thread."""
        key = (grammar, eos_token_ids)
        if key not in self._kept:
            self._tokenizer(eos_token_ids)  # which is not the grammar's cost
            start_s = time.thread_time()
            matcher = self.compile(grammar, eos_token_ids)
            self._kept[key] = _Kept(matcher, time.thread_time() - start_s)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and (len(self._kept) > _MAX_KEPT or self._compile_s() > _MAX_KEPT_COMPILE_S):
            self._kept.popitem(last=False)
        return self._kept[key].matcher

    def forget(self, grammar: str, eos_token_ids: frozenset[int]) -> None:
        """Copies share what their lexers have learned, limits included: one that met a limit spoils the next ones."""
        self._kept.pop((grammar, eos_token_ids), None)

    def compile(self, grammar: str, eos_token_ids: frozenset[int]) -> Any:
        """A matcher of its own. Raises GrammarError. On the thread."""
        return compile_grammar(self._tokenizer(eos_token_ids), grammar)

    def _tokenizer(self, eos_token_ids: frozenset[int]) -> Any:
        if eos_token_ids not in self._tokenizers:
            if self._tokenizer_json is None:
                self._tokenizer_json = self._read()
            tokenizer = make_tokenizer(self._tokenizer_json, self._vocab_size, eos_token_ids)
            self._tokenizers = {eos_token_ids: tokenizer}
        return self._tokenizers[eos_token_ids]

    def close(self) -> None:
        """Ends the thread once it is idle."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile_s(self) -> float:
        return sum(kept.compile_s for kept in self._kept.values())
