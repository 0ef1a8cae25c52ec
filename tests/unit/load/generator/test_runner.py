"""The open loop against a server that does as it is told: nothing that goes wrong is lost, nothing waits for anything else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from helpers.scripted_openai import NUM_TOKENS, ScriptedServer, scripted_openai
from helpers.waiting import eventually

from baton.load.generator.http_client import HttpClient, Target
from baton.load.generator.prompts import PromptMaker, Vocabulary
from baton.load.generator.records import Outcome, RequestRecord
from baton.load.generator.runner import OpenLoop, RunResult
from baton.load.generator.sender import RequestMaker, Sender
from baton.load.generator.target import Endpoint, ServerUnusable, find_model, token_vocabulary, word_vocabulary
from baton.load.generator.workload import Lengths, made_up

WORDS = Vocabulary(["a", "b", "c"])
TIMEOUT_S = 60.0


async def drive(
    server: ScriptedServer,
    times_s: list[float],
    lengths: Lengths | None = None,
    *,
    endpoint: Endpoint = "completions",
    vocabulary: Vocabulary[Any] = WORDS,
    timeout_s: float = TIMEOUT_S,
    stop: asyncio.Event | None = None,
    **options: Any,
) -> RunResult:
    with closing(HttpClient(Target.parse(server.url), {"x-extra": "1"})) as client:
        loop = OpenLoop(
            made_up(times_s, lengths or Lengths(6, 4), random.Random(0)),
            prompts=PromptMaker(vocabulary, 0),
            requests=RequestMaker("m", endpoint, {"temperature": 0.5}, True),
            make_sender=lambda clock: Sender(client, endpoint, timeout_s=timeout_s, clock=clock),
            **options,
        )
        return await loop.run(stop or asyncio.Event())


@contextmanager
def asking(server: ScriptedServer) -> Iterator[HttpClient]:
    """A client of it."""
    with scripted_openai(server), closing(HttpClient(Target.parse(server.url), {})) as client:
        yield client


async def one(act: str, **options: Any) -> RequestRecord:
    with scripted_openai(ScriptedServer(script=[act])) as server:
        (record,) = (await drive(server, [0.0], **options)).records
    return record


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_a_completed_request_has_its_tokens_times_and_the_servers_counts(endpoint: Endpoint) -> None:
    record = await one("ok", endpoint=endpoint)
    assert (record.outcome, record.error, record.status, record.request_id) == (Outcome.COMPLETED, "", 200, "r-1")
    assert (record.input_len, record.output_len, record.cached_len) == (20, NUM_TOKENS, 16)
    assert len(record.token_times_s) == NUM_TOKENS
    assert record.started_s is not None
    assert record.sent_s is not None
    assert record.ended_s is not None
    times = [record.intended_s, record.started_s, record.sent_s, *record.token_times_s, record.ended_s]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("act", "outcome", "words"),
    [
        ("refuse", Outcome.REFUSED, "429: scripted to refuse"),
        ("busy", Outcome.REFUSED, "503: scripted to busy"),
        ("fail", Outcome.ERROR, "500: scripted to fail"),
        ("cut", Outcome.ERROR, "the stream was cut off"),
        ("close", Outcome.ERROR, "the server closed the connection"),
        ("error", Outcome.ERROR, "error in the stream: scripted error"),
        ("no-end", Outcome.ERROR, "the stream ended without its end"),
        ("empty", Outcome.ERROR, "no token came"),
        ("garbage", Outcome.ERROR, "error in the stream: an event that cannot be read"),
    ],
)
async def test_what_goes_wrong_is_a_miss_with_its_reason(act: str, outcome: Outcome, words: str) -> None:
    record = await one(act)
    assert record.outcome is outcome
    assert record.error.startswith(words)
    assert record.ended_s is not None


@pytest.mark.parametrize(("act", "num_tokens"), [("stall", 1), ("silent", 0)])
async def test_a_server_that_stalls_is_given_up_after_the_timeout(act: str, num_tokens: int) -> None:
    record = await one(act, timeout_s=0.3)
    assert (record.outcome, record.error) == (Outcome.TIMEOUT, "no end within 0.3 s")
    assert len(record.token_times_s) == num_tokens
    assert record.ended_s is not None
    assert record.ended_s >= 0.3


async def test_nobody_there_is_an_error_of_the_request() -> None:
    (record,) = (await drive(ScriptedServer(url="http://127.0.0.1:1"), [0.0])).records
    assert record.outcome is Outcome.ERROR
    assert record.error.startswith("no connection: ")


async def test_requests_are_sent_by_the_clock_while_others_hang() -> None:
    with scripted_openai(ScriptedServer(script=["silent", "silent", "ok"])) as server:
        stop = asyncio.Event()
        ended: list[RequestRecord] = []
        run = asyncio.create_task(drive(server, [0.0, 0.01, 0.02, 0.03], stop=stop, on_end=ended.append))
        await eventually(lambda: len(ended) == 2, timeout_s=30)
        stop.set()
        result = await run
    assert [record.index for record in result.records] == [2, 3]
    assert [record.outcome for record in result.records] == [Outcome.COMPLETED] * 2
    assert (result.is_interrupted, result.num_given_up, result.num_planned) == (True, 2, 4)


async def test_no_request_is_sent_before_it_is_due() -> None:
    times = [index * 0.003 for index in range(40)]
    with scripted_openai(ScriptedServer()) as server:
        result = await drive(server, times)
    assert [record.intended_s for record in result.records] == times
    for record in result.records:
        assert record.started_s is not None
        assert record.started_s >= record.intended_s


async def test_waiting_for_a_slot_counts_as_waiting() -> None:
    with scripted_openai(ScriptedServer(script=["silent", "ok"])) as server:
        result = await drive(server, [0.0, 0.0], max_concurrency=1, timeout_s=0.5)
        assert len(server.bodies) == 1  # the first one's time was over, and so was the second one's
    assert [record.outcome for record in result.records] == [Outcome.TIMEOUT] * 2


async def test_connections_are_used_again_one_request_at_a_time() -> None:
    with scripted_openai(ScriptedServer()) as server:
        await drive(server, [0.0] * 8, max_concurrency=1)
        assert len(server.transports) == 1
        assert len(server.bodies) == 8


async def test_a_conversation_continues_with_the_answer_in_one_session_after_its_pause() -> None:
    lengths = Lengths(6, 4, num_turns=3, turn_input_len=2, pause_s=0.02)
    with scripted_openai(ScriptedServer()) as server:
        result = await drive(server, [0.0], lengths, endpoint="chat", session_prefix="bench-x")
        bodies, headers = server.bodies, server.headers
    assert [len(body["messages"]) for body in bodies] == [1, 3, 5]
    assert bodies[2]["messages"][:3] == bodies[1]["messages"]
    assert bodies[1]["messages"][1] == {"role": "assistant", "content": " w0 w1 w2 w3"}
    assert [len(body["messages"][-1]["content"].split()) for body in bodies] == [6, 2, 2]
    assert {header["x-session-id"] for header in headers} == {"bench-x-0"}
    for before, after in zip(result.records, result.records[1:], strict=False):
        assert before.ended_s is not None
        assert after.intended_s > before.ended_s


async def test_token_id_conversations_continue_with_the_answers_ids() -> None:
    with scripted_openai(ScriptedServer()) as server:
        lengths = Lengths(6, 4, num_turns=2, turn_input_len=2)
        await drive(server, [0.0], lengths, vocabulary=Vocabulary([500, 501]))
        first, second = (body["prompt"] for body in server.bodies)
    assert len(first) == 6
    assert second[:10] == [*first, 0, 1, 2, 3]
    assert len(second) == 12


async def test_turns_behind_a_failed_one_are_misses_that_were_not_sent() -> None:
    with scripted_openai(ScriptedServer(script=["ok", "refuse"])) as server:
        result = await drive(server, [0.0], Lengths(6, 4, num_turns=4))
        assert len(server.bodies) == 2
    assert [record.outcome.value for record in result.records] == ["completed", "refused", "not_sent", "not_sent"]


async def test_every_body_has_what_was_asked_for() -> None:
    with scripted_openai(ScriptedServer()) as server:
        await drive(server, [0.0], headers={"x-slo-ttft-ms": "500"})
        (body,), (headers,) = server.bodies, server.headers
    assert len(body.pop("prompt").split()) == 6
    assert body == {
        "model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4, "ignore_eos": True,
        "temperature": 0.5,
    }  # fmt: skip
    assert (headers["x-extra"], headers["x-slo-ttft-ms"]) == ("1", "500")


@pytest.mark.parametrize(
    ("endpoint", "can_tokenize", "per_word", "overhead"),
    [
        ("chat", True, 1.0, 10.0),
        ("completions", True, 1.0, 0.0),
        ("chat", False, 2.0, 7.0),
        ("completions", False, 2.0, 7.0),
    ],
)
async def test_lengths_come_from_tokenize_or_from_the_usage_of_two_requests(
    endpoint: Endpoint, can_tokenize: bool, per_word: float, overhead: float
) -> None:
    with asking(ScriptedServer(can_tokenize=can_tokenize)) as client:
        vocabulary = await word_vocabulary(client, "m", endpoint)
    assert (vocabulary.tokens_per_unit, vocabulary.overhead) == (per_word, pytest.approx(overhead))


async def test_token_ids_are_those_of_ordinary_words_and_need_tokenize() -> None:
    with asking(server := ScriptedServer()) as client:
        vocabulary = await token_vocabulary(client, "m")
        assert set(vocabulary.units) <= set(range(100, 120))
        server.can_tokenize = False
        with pytest.raises(ServerUnusable, match="--prompt text"):
            await token_vocabulary(client, "m")


async def test_the_model_is_the_first_one_or_must_be_there() -> None:
    with asking(server := ScriptedServer(models=["one", "two"])) as client:
        assert (await find_model(client, None)).name == "one"
        assert (await find_model(client, "two")).max_len == 4096
        with pytest.raises(ServerUnusable, match="no model 'three'; there are: one, two"):
            await find_model(client, "three")
        server.models = []
        with pytest.raises(ServerUnusable, match="lists none"):
            await find_model(client, None)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:81", Target("h", 81, False, "")),
        ("https://h/v1/", Target("h", 443, True, "")),
        ("http://h/gate", Target("h", 80, False, "/gate")),
        ("http://[::1]:9", Target("::1", 9, False, "")),
    ],
)
def test_urls_are_servers_with_or_without_a_path(url: str, expected: Target) -> None:
    assert Target.parse(url) == expected
