"""``python -m baton.services.gateway.grammar_helper``: tries grammars out for a gateway, each in a process of its own.

A grammar comes from a client, and compiling one is a long way through native code that cannot be interrupted: it may take
seconds, memory, or the whole process (a rule that refers to the next one, ten thousand times, overflows the stack).
So this process loads the tokenizer, forks for each grammar, and lets the child have so much time, memory and stack, and no
more.

Frames on standard input and output: four bytes of length, then UTF-8. The first is JSON with tokenizer, vocab_size and eos;
each later one a grammar. The answer is empty, or what is wrong.
"""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import struct
import sys
from contextlib import suppress
from typing import IO, Any

import orjson

from baton.services.engine.grammar import GrammarError, compile_grammar, first_line, make_tokenizer

CPU_S = 0.25
# A machine that is busy may take longer for so much work, not for ever.
WALL_S = 4.0
MEMORY_BYTES = 128 << 20
# A worker has 64 MiB for the same.
STACK_BYTES = 2 << 20
_MAX_FRAME_BYTES = 1 << 30
# Tokens that are drawn on trial: a grammar that fails at once should not reach a worker.
_NUM_TRIAL_TOKENS = 12

TOO_LONG = f"takes more than {CPU_S:g} s to compile"
TOO_LARGE = f"needs more than {MEMORY_BYTES >> 20} MiB or is nested too deeply"


def read_frame(stream: IO[bytes]) -> bytes | None:
    """None at the end of the stream."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack("!I", head)
    if size > _MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {size} bytes")
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: IO[bytes], body: bytes) -> None:
    stream.write(struct.pack("!I", len(body)) + body)
    stream.flush()


def try_grammar(tokenizer: Any, grammar: str) -> str:
    """What is wrong with a grammar; empty when nothing is. Compiles it and draws a few tokens."""
    try:
        matcher = compile_grammar(tokenizer, grammar)
    except GrammarError as error:
        return error.message
    rng = random.Random(grammar)  # noqa: S311  any tokens will do
    for _ in range(_NUM_TRIAL_TOKENS):
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            return first_line(matcher.get_error())
        if matcher.is_stopped():
            break
        allowed = [index for index, digit in enumerate(reversed(f"{bits:b}")) if digit == "1"]
        if not allowed:
            return "nothing matches it"
        others = [token_id for token_id in allowed if token_id not in tokenizer.eos_tokens]
        if not others:
            break
        token_id = rng.choice(others)
        if not matcher.consume_token(token_id):
            return first_line(matcher.get_error())
    return "" if matcher.stop_reason() in ("NotStopped", "NoExtension", "EndOfSentence") else "nothing matches it"


def _limit_this_process() -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, also inside of native code
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def judge(tokenizer: Any, grammar: str) -> str:
    """``try_grammar`` in a child, whose death is an answer as well."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.close(read_end)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what native code says of its death is for nobody
            _limit_this_process()
            os.write(write_end, b"=" + try_grammar(tokenizer, grammar).encode()[:2000])
        os._exit(0)
    os.close(write_end)
    try:
        ready, _, _ = select.select([read_end], [], [], WALL_S)
        verdict = os.read(read_end, 4096) if ready else b""
    finally:
        os.close(read_end)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if verdict.startswith(b"="):
        return verdict[1:].decode(errors="replace")
    is_slow = not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
    return TOO_LONG if is_slow else TOO_LARGE


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway closes our input when it ends
    source, target = sys.stdin.buffer, sys.stdout.buffer
    start = read_frame(source)
    if start is None:
        return
    settings = orjson.loads(start)
    try:
        tokenizer = make_tokenizer(settings["tokenizer"], settings["vocab_size"], frozenset(settings["eos"]))
    except GrammarError as error:
        write_frame(target, error.message.encode())
        return
    write_frame(target, b"")
    while (grammar := read_frame(source)) is not None:
        write_frame(target, judge(tokenizer, grammar.decode()).encode())


if __name__ == "__main__":
    main()
