"""``baton chat``: a conversation with a served model in the terminal, or one question and its answer."""

from __future__ import annotations

import json
import secrets
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from baton.services.local.gateway_client import GatewayClient, StreamRefused
from baton.services.local.gateway_command import Refused, checked, refusal, with_gateway

_ANSWER_S = 600.0
_HELP = """/reset           forget the conversation
/system TEXT     set the system message (alone: remove it) and forget the conversation
/save FILE       write the conversation as JSON
/stats           time to first token, time per token and tokens of the last answer
/quit            leave, like Ctrl-D; Ctrl-C stops an answer"""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What every request of a conversation has."""

    model: str | None = None
    system: str | None = None
    session_id: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None


@dataclass(slots=True)
class TurnStats:
    """Of one answer, as this client saw it."""

    response_id: str = ""
    ttft_s: float | None = None
    duration_s: float = 0.0
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def words(self) -> str:
        """One line."""
        tokens = self.usage.get("completion_tokens")
        parts = [f"TTFT {self.ttft_s * 1e3:.0f} ms" if self.ttft_s is not None else "no token"]
        if tokens and tokens > 1 and self.ttft_s is not None:
            parts.append(f"TPOT {(self.duration_s - self.ttft_s) / (tokens - 1) * 1e3:.1f} ms")
        if self.usage:
            cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            parts.append(f"{self.usage['prompt_tokens']} prompt tokens ({cached} cached), {tokens} in the answer")
        parts.append(f"end: {self.finish_reason or 'stopped'}")
        return ", ".join(parts) + (f"; baton explain {self.response_id}" if self.response_id else "")


class Conversation:
    """Messages so far, and asking for the next one."""

    def __init__(self, client: GatewayClient, options: ChatOptions) -> None:
        self._client = client
        self._options = options
        self.session_id = options.session_id or f"chat-{secrets.token_hex(6)}"
        self.system = options.system
        self.messages: list[dict[str, str]] = []
        self.last: TurnStats | None = None
        self.reset()

    def model_name(self) -> str:
        """The model that answers. Raises Refused."""
        return self._options.model or str(checked(self._client.get("/v1/models"))["data"][0]["id"])

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str) -> Generator[tuple[str, str], None, None]:
        """Pieces of the answer as they come: ("reasoning" or "content", text).

        Closing it early keeps what came as the answer. A question that fails leaves no trace. Raises Refused and
        GatewayUnreachable.
        """
        stats = self.last = TurnStats()
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        start_s = time.monotonic()
        try:
            for chunk in self._chunks():
                stats.response_id = chunk.get("id") or stats.response_id
                stats.usage = chunk.get("usage") or stats.usage
                for choice in chunk.get("choices") or ():
                    stats.finish_reason = choice.get("finish_reason") or stats.finish_reason
                    for kind, piece in _pieces(choice.get("delta") or {}):
                        if stats.ttft_s is None:
                            stats.ttft_s = time.monotonic() - start_s
                        if kind == "content":
                            answer.append(piece)
                        yield kind, piece
        finally:
            stats.duration_s = time.monotonic() - start_s
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()

    def _chunks(self) -> Iterator[dict[str, Any]]:
        options = self._options
        body: dict[str, Any] = {
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "session_id": self.session_id,
        }
        for name in ("model", "max_tokens", "temperature"):
            if (value := getattr(options, name)) is not None:
                body[name] = value
        try:
            for line in self._client.stream("/v1/chat/completions", body):
                chunk = json.loads(line)
                if "error" in chunk:
                    raise Refused(f"ended the answer with an error: {refusal(chunk)}")
                yield chunk
        except StreamRefused as error:
            raise Refused(f"answered {error.answer.status}: {refusal(error.answer.body)}") from None


def chat(url: str, api_key: str | None, question: str | None, options: ChatOptions) -> int:
    """One answer where there is a question (an argument, or standard input that is no terminal); else a conversation."""
    piped = None if sys.stdin.isatty() else sys.stdin.read().strip()
    asked = "\n\n".join(part for part in (question, piped) if part)

    def talk(client: GatewayClient) -> int:
        conversation = Conversation(client, options)
        if asked:
            return _answer_once(conversation, asked)
        if piped is not None:
            sys.stderr.write("baton chat: standard input is empty and there is no question\n")
            return 2
        return Repl(conversation, Console(highlight=False)).run()

    return with_gateway("chat", url, api_key, talk, timeout_s=_ANSWER_S)


def _answer_once(conversation: Conversation, text: str) -> int:
    """The answer alone on standard output, so that it can go into a file or a pipe."""
    with _ctrl_c_interrupts():
        try:
            for kind, piece in conversation.ask(text):
                if kind == "content":
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        finally:
            sys.stdout.write("\n")
    return 0


class Repl:
    """Questions, answers and commands, until Ctrl-D."""

    def __init__(self, conversation: Conversation, console: Console) -> None:
        self._conversation = conversation
        self._console = console

    def run(self) -> int:
        conversation, console = self._conversation, self._console
        _edit_lines()
        console.print(
            f"[bold]{conversation.model_name()}[/bold], session {conversation.session_id}. /help, or Ctrl-D to leave."
        )
        with _ctrl_c_interrupts():
            while True:
                try:
                    line = input("> ").strip()
                except KeyboardInterrupt:
                    console.print("[dim]Ctrl-D leaves[/dim]")
                    continue
                except EOFError:
                    console.print()
                    return 0
                if line in ("/quit", "/exit"):
                    return 0
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.turn(line)

    def turn(self, text: str) -> None:
        """One question. A refusal is said and does not end the conversation."""
        console, conversation = self._console, self._conversation
        pieces = conversation.ask(text)
        try:
            for kind, piece in pieces:
                style = "dim italic" if kind == "reasoning" else ""
                console.print(piece, end="", style=style, markup=False, soft_wrap=True)
            console.print()
        except KeyboardInterrupt:
            pieces.close()  # the connection closes, and the server stops
            console.print("\n[dim]stopped[/dim]")
        except Refused as error:
            console.print(f"[red]the gateway {error}[/red]")
            return
        if conversation.last is not None:
            console.print(conversation.last.words(), style="dim", markup=False)

    def command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        console, conversation = self._console, self._conversation
        if name == "/reset":
            conversation.reset()
            console.print("[dim]forgotten[/dim]")
        elif name == "/system":
            conversation.system = rest or None
            conversation.reset()
            console.print(f"[dim]{'set' if rest else 'removed'}; the conversation begins anew[/dim]")
        elif name == "/save":
            self._save(rest)
        elif name == "/stats":
            console.print(conversation.last.words() if conversation.last else "nothing was asked yet", markup=False)
        else:
            console.print(_HELP if name == "/help" else f"there is no {name}\n{_HELP}", markup=False)

    def _save(self, name: str) -> None:
        console = self._console
        if not name:
            console.print("/save needs a file", markup=False)
            return
        content = {"session_id": self._conversation.session_id, "messages": self._conversation.messages}
        try:
            Path(name).expanduser().write_text(
                json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            console.print(f"cannot write {name}: {error.strerror}", style="red", markup=False)
        else:
            console.print(f"saved to {name}", style="dim", markup=False)


def _pieces(delta: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
        yield "reasoning", reasoning
    if content := delta.get("content"):
        yield "content", content


def _edit_lines() -> None:
    """Arrow keys and a history of what was typed, where the platform has them."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)


@contextmanager
def _ctrl_c_interrupts() -> Iterator[None]:
    """``baton`` ends at once on SIGINT; in here it is KeyboardInterrupt."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
