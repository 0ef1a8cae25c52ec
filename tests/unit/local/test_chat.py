"""``baton chat`` against a scripted server: answers as they come, history, commands, Ctrl-C, pipes."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from helpers.scripted_openai import ScriptedServer, scripted_openai
from helpers.waiting import eventually_sync
from rich.console import Console

from baton.services.local.chat import ChatOptions, Conversation, Repl, TurnStats, chat
from baton.services.local.gateway_client import GatewayClient, GatewayUnreachable
from baton.services.local.gateway_command import Refused

ANSWER = " w0 w1 w2 w3"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_openai(ScriptedServer()) as running:
        yield running


def conversation(server: ScriptedServer, **options: object) -> Conversation:
    return Conversation(GatewayClient.from_url(server.url, timeout_s=60.0), ChatOptions(**options))  # type: ignore[arg-type]


def answer(talk: Conversation, text: str) -> str:
    return "".join(piece for _, piece in talk.ask(text))


def test_a_turn_is_asked_with_all_before_it_in_one_session(server: ScriptedServer) -> None:
    talk = conversation(server, system="be brief", model="m", max_tokens=9, temperature=0.5)
    assert answer(talk, "one") == ANSWER
    assert answer(talk, "two") == ANSWER
    first, second = server.bodies
    assert first["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    assert second["messages"] == [
        *first["messages"], {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "two"},
    ]  # fmt: skip
    assert first["session_id"] == second["session_id"] == talk.session_id
    assert (first["model"], first["max_tokens"], first["temperature"], first["stream"]) == ("m", 9, 0.5, True)


def test_stats_are_those_of_the_last_answer(server: ScriptedServer) -> None:
    talk = conversation(server)
    answer(talk, "one")
    stats = talk.last
    assert stats is not None
    assert stats.ttft_s is not None
    assert 0 < stats.ttft_s <= stats.duration_s
    assert "20 prompt tokens (16 cached), 4 in the answer, end: length; baton explain s" in stats.words()
    assert TurnStats(ttft_s=0.2, duration_s=0.5, usage={"prompt_tokens": 9, "completion_tokens": 4}).words().startswith(
        "TTFT 200 ms, TPOT 100.0 ms, 9 prompt tokens"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("act", "words"),
    [("refuse", "answered 429: scripted to refuse"), ("error", "ended the answer with an error: scripted error")],
)
def test_a_question_that_fails_is_said_and_leaves_the_conversation_usable(act: str, words: str) -> None:
    with scripted_openai(ScriptedServer(script=[act, "ok"])) as server:
        talk = conversation(server)
        with pytest.raises(Refused, match=words):
            answer(talk, "one")
        talk.reset()
        assert answer(talk, "two") == ANSWER
        assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_a_refused_question_leaves_no_trace_and_a_stream_that_breaks_is_an_error() -> None:
    with scripted_openai(ScriptedServer(script=["refuse", "cut", "no-end"])) as server:
        talk = conversation(server)
        with pytest.raises(Refused):
            answer(talk, "one")
        assert talk.messages == []
        for _ in range(2):
            with pytest.raises(GatewayUnreachable):
                answer(talk, "one")


def test_stopping_early_closes_the_connection_and_keeps_what_came(server: ScriptedServer) -> None:
    server.script = ["stall"]
    talk = conversation(server)
    with closing(talk.ask("one")) as pieces:
        assert next(pieces) == ("content", " w0")
    eventually_sync(lambda: server.num_open == 0, timeout_s=30, what="the closed connection")
    assert talk.messages[-1] == {"role": "assistant", "content": " w0"}


def test_commands_reset_set_save_and_explain(server: ScriptedServer, tmp_path: Path) -> None:
    talk = conversation(server)
    console = Console(file=io.StringIO(), width=200)
    repl = Repl(talk, console)
    file = tmp_path / "talk.json"
    repl.turn("one")
    for line in (f"/save {file}", "/system be kind", "/stats", "/save", "/nonsense", f"/save {tmp_path}"):
        repl.command(line)
    assert [message["content"] for message in json.loads(file.read_text())["messages"]] == ["one", ANSWER]
    assert talk.messages == [{"role": "system", "content": "be kind"}]
    repl.command("/system")
    assert talk.messages == []
    repl.turn("two")
    repl.command("/reset")
    assert talk.messages == []
    out = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("w0 w1 w2 w3", "TTFT", "TPOT", "/save needs a file", "there is no /nonsense", "cannot write"):
        assert words in out


def test_a_question_on_the_command_line_and_on_standard_input_is_one_question(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("some text\n"))
    assert chat(server.url, "sesame", "summarize", ChatOptions()) == 0
    assert capsys.readouterr().out == ANSWER + "\n"
    assert server.bodies[0]["messages"][0]["content"] == "summarize\n\nsome text"
    assert server.headers[0]["authorization"] == "Bearer sesame"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert chat(server.url, None, None, ChatOptions()) == 2
    assert "standard input is empty" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("x"))
    assert chat("http://127.0.0.1:1", None, None, ChatOptions()) == 1
    assert "no gateway answers" in capsys.readouterr().err


def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves() -> None:
    with scripted_openai(ScriptedServer(script=["stall", "ok"])) as server:
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "baton.services.local", "chat", "--url", server.url]
        with subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            os.close(slave)
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            shown = bytearray()

            def has(words: bytes) -> bool:
                shown.extend(process.stdout.read() or b"")  # type: ignore[union-attr]
                return words in shown

            eventually_sync(lambda: has(b"Ctrl-D to leave"), timeout_s=60, what="the greeting")
            os.write(master, b"one\n")
            eventually_sync(lambda: has(b"w0"), timeout_s=60, what="the first token")
            process.send_signal(signal.SIGINT)
            eventually_sync(lambda: has(b"stopped"), timeout_s=60, what="the end of the answer")
            os.write(master, b"two\n")
            eventually_sync(lambda: has(b"w3"), timeout_s=60, what="the second answer")
            os.write(master, b"\x04")
            assert process.wait(60) == 0
        os.close(master)
        assert [message["content"] for message in server.bodies[1]["messages"]] == ["one", " w0", "two"]
