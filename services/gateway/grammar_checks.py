"""Has grammars tried out in helper processes (``grammar_helper.py``), and remembers what came of it."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import orjson

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.errors import invalid
from baton.services.gateway.grammar import Grammar
from baton.services.gateway.grammar_helper import read_frame, write_frame
from baton.services.runtime.convert import MAX_GRAMMAR_BYTES

NUM_HELPERS = 2
# Checks at once, those that wait included. Each takes a few milliseconds, a hostile one half a second.
MAX_WAITING = 32
_MAX_VERDICTS = 10_000


class GrammarChecker:
    """``settings``: what a helper begins with. Helpers are started when the first grammar comes, and again when one is lost."""

    def __init__(self, settings: Callable[[], dict[str, object]]) -> None:
        self._settings = settings
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()  # by digest: a grammar may be large
        self._num_waiting = 0
        self._pool: ThreadPoolExecutor | None = None
        self._own = threading.local()  # each thread's helper
        self._helpers: list[_Helper] = []
        self._is_closed = False

    async def check(self, grammar: Grammar) -> str:
        """The grammar's text, when workers can follow it. Raises INVALID_REQUEST, or OVERLOADED when too many wait."""
        text = grammar.text
        encoded = text.encode()
        if len(encoded) > MAX_GRAMMAR_BYTES:
            raise invalid(
                grammar.param, f"makes a grammar of {len(encoded)} bytes; at most {MAX_GRAMMAR_BYTES} can be used"
            )
        key = hashlib.blake2b(encoded, digest_size=16).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = await self._ask(text)
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        else:
            self._verdicts.move_to_end(key)
        if verdict:
            raise invalid(grammar.param, f"cannot be used: {verdict}")
        return text

    async def _ask(self, text: str) -> str:
        if self._num_waiting >= MAX_WAITING:
            raise BatonError(ErrorCode.OVERLOADED, "too many grammars are being compiled", retry_after_s=1.0)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_HELPERS, thread_name_prefix="grammar-check")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._judge, text)
        finally:
            self._num_waiting -= 1

    def _judge(self, text: str) -> str:
        """On a thread of the pool."""
        helper: _Helper | None = getattr(self._own, "helper", None)
        if helper is not None and not helper.is_alive:
            helper.close()
            self._helpers.remove(helper)
            helper = None
        if helper is None:
            helper = self._own.helper = self._start()
        return helper.judge(text)

    def _start(self) -> _Helper:
        helper = _Helper(self._settings())
        if self._is_closed:
            helper.close()
            raise BatonError(ErrorCode.DRAINING, "the gateway is stopping")
        self._helpers.append(helper)
        return helper

    def close(self) -> None:
        """Ends the helpers."""
        self._is_closed = True
        for helper in self._helpers:
            helper.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for helper in self._helpers:  # one that was started meanwhile
            helper.close()


class _Helper:
    """One helper process. One thread uses it; any may close it."""

    def __init__(self, settings: dict[str, object]) -> None:
        self._problem = ""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "baton.services.gateway.grammar_helper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._problem = self._exchange(orjson.dumps(settings))

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None or bool(self._problem)

    def judge(self, text: str) -> str:
        """What is wrong with a grammar; empty when nothing is."""
        return self._problem or self._exchange(text.encode())

    def _exchange(self, body: bytes) -> str:
        try:
            write_frame(self._pipe(self._process.stdin), body)
            answer = read_frame(self._pipe(self._process.stdout))
        except (OSError, ValueError):
            answer = None
        if answer is not None:
            return answer.decode(errors="replace")
        self.close()
        raise BatonError(ErrorCode.OVERLOADED, f"a grammar helper was lost, status {self._process.returncode}")

    def _pipe(self, pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                self._pipe(pipe).close()
            except OSError:  # what was still to be written
                continue
