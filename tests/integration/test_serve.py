"""``baton serve`` as its users meet it: real processes, a real NATS server, the openai client, stock gRPC."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from helpers.oracle import Subject, expected_tokens, make_prompt, make_subject
from helpers.serving import Serving, serving
from helpers.waiting import eventually_sync

OPTIONS = ("--kv-cache-memory", "32MiB", "--max-num-seqs", "32", "--dtype", "float32", "--served-model-name", "tiny")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(subject: Subject) -> Iterator[Serving]:
    with serving("--model", str(subject.path), *OPTIONS) as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60.0) as made:
        yield made


MESSAGES: Any = [{"role": "user", "content": "the code for the door is here, what is the code for the door"}]


def complete(server: Serving, prompt: Any, **parameters: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    response = server.post("/v1/completions", {**body, "return_token_ids": True, **parameters})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_token_ids_equal_transformers(server: Serving, subject: Subject) -> None:
    for length in (1, 17, 130):
        prompt = make_prompt(length, seed=77)
        answer = complete(server, list(prompt))
        assert answer["choices"][0]["token_ids"] == expected_tokens(subject, prompt)
        assert answer["usage"]["prompt_tokens"] == length
        assert answer["usage"]["completion_tokens"] == 24


def test_the_openai_client_chats(client: openai.OpenAI, server: Serving) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    receipt = server.get(f"/v1/requests/{answer.id}").json()
    assert receipt["decision"]["mode"] == "remote"
    assert (receipt["decision"]["prefill"], receipt["decision"]["decode"]) == ("prefill-0", "decode-0")
    assert receipt["transfer"]["checksum"] == "xxh3_64 ok"
    assert sum(receipt["phases_ms"].values()) == pytest.approx(receipt["ttft_ms"], abs=1.0)


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_cover_every_token_the_first_one_too(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 8
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)  # greedy takes the likeliest


def test_three_choices_with_a_seed_differ_and_repeat(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=12, temperature=1.0, n=3, seed=5
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert len(set(first)) == 3
    assert ask() == first


def test_a_stop_string_ends_the_text_before_itself(client: openai.OpenAI) -> None:
    free = client.completions.create(
        model="tiny", prompt="the code", max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
    )
    text = free.choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    assert stop.isprintable(), "the model's text changed: choose another prompt"
    stopped = client.completions.create(
        model="tiny", prompt="the code", max_tokens=24, temperature=0, stop=[stop], extra_body={"ignore_eos": True}
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_cached_tokens_are_counted_and_kept_apart_by_salt(server: Serving) -> None:
    prompt = list(make_prompt(50, seed=78))

    def cached(**parameters: Any) -> int:
        return int(complete(server, prompt, **parameters)["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(), cached()] == [0, 48]
    assert [cached(cache_salt="other"), cached(cache_salt="other")] == [0, 48]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[1]", 400, None),
        (b'{"model": "tiny"}', 400, "prompt"),
        (b'{"model": "nobody", "prompt": "x"}', 404, "model"),
        (b'{"model": "tiny", "prompt": "x", "temperature": -1}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": "x", "temperature": "hot"}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": -5}', 400, "max_tokens"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": 99999}', 400, "max_tokens"),
        (b'{"model": "tiny", "prompt": "x", "top_p": 0}', 400, "top_p"),
        (b'{"model": "tiny", "prompt": [5, 400]}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": [5, -1]}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": "x", "n": 0}', 400, "n"),
        (b'{"model": "tiny", "prompt": "x", "stream_options": {"include_usage": true}}', 400, "stream_options"),
    ],
)
def test_bad_input_is_named_and_the_next_request_works(
    server: Serving, body: bytes, status: int, param: str | None
) -> None:
    response = httpx.post(
        f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=30.0
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert complete(server, "the code")["choices"][0]["finish_reason"] == "length"


def test_a_prompt_over_the_context_length_is_refused_before_the_stream_begins(server: Serving) -> None:
    prompt = list(make_prompt(1500))
    response = server.post("/v1/completions", {"model": "tiny", "prompt": prompt, "stream": True})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 1024 tokens" in error["message"]
    assert "1500" in error["message"]


def test_the_other_pages_answer(server: Serving) -> None:
    assert server.get("/health").status_code == 200
    assert server.get("/ready").status_code == 200
    assert server.get("/version").json()
    models = server.get("/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("tiny", 1024)]
    tokens = server.post("/tokenize", {"model": "tiny", "prompt": "the code"}).json()["tokens"]
    assert server.post("/detokenize", {"model": "tiny", "tokens": tokens}).json()["prompt"] == "the code"
    complete(server, "the code")  # counters with labels appear with their first count
    metrics = server.get("/metrics").text
    for name in ("baton_ttft_seconds_bucket", "baton_kv_blocks{", "baton_requests_total{", "baton_kv_ledger_error 0.0"):
        assert name in metrics
    assert server.get("/v1/requests/nobody").status_code == 404
    assert server.get("/nowhere").json()["error"]["type"]


def test_a_stock_grpc_client_needs_only_reflection(server: Serving, subject: Subject) -> None:
    prompt = make_prompt(17, seed=79)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "baton.api.inference.v1.InferenceService" in database.get_services()
        pool = descriptor_pool.DescriptorPool(database)
        service = pool.FindServiceByName("baton.api.inference.v1.InferenceService")
        method = service.FindMethodByName("Generate")
        request_type = message_factory.GetMessageClass(method.input_type)
        response_type = message_factory.GetMessageClass(method.output_type)
        request = json_format.ParseDict(
            {"tokens": {"tokenIds": list(prompt)}, "maxTokens": 24, "temperature": 0.0, "ignoreEos": True},
            request_type(),
        )
        call = channel.unary_stream(
            f"/{service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response_type.FromString,
        )
        responses = list(call(request, timeout=60.0))
    token_ids = [token.token_id for response in responses for token in response.tokens]
    assert token_ids == expected_tokens(subject, prompt)
    assert responses[-1].usage.completion_tokens == 24


def private_bytes(process: psutil.Process) -> int:
    """Without the KV cache, which lies in shared memory and is filled little by little."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def test_hundreds_of_disconnects_leave_nothing_behind(server: Serving) -> None:
    """Clients that hang up at any moment, in any phase: no block, descriptor or memory stays behind."""
    complete(server, "the code")
    processes = [psutil.Process(worker["pid"]) for worker in server.workers()]

    def hang_up(index: int) -> None:
        body = {
            "model": "tiny",
            "prompt": list(make_prompt(20 + 31 * (index % 20), seed=index)),
            "max_tokens": 300,
            "stream": bool(index % 3),
            "ignore_eos": True,
        }
        timeout = httpx.Timeout(60.0, read=0.002 * (index % 40) + 0.001)
        try:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=timeout) as response:
                for number, _ in enumerate(response.iter_lines()):
                    if number > index % 50:
                        break
        except httpx.TimeoutException:
            pass

    def storm(first: int) -> None:
        threads = [
            threading.Thread(target=lambda n=n: [hang_up(first + n + 8 * i) for i in range(13)]) for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.assert_clean()

    storm(0)  # 104 requests: pools and buffers grow to their size
    descriptors = [process.num_fds() for process in processes]
    storm(104)
    for process, before in zip(processes, descriptors, strict=True):
        assert process.num_fds() <= before + 3
    # What a step needs depends on which prompts meet in it, so the allocators take several storms to see the most. A leak
    # makes every storm grow.
    growths = []
    while not growths or max(growths[-1]) > 0.03:
        assert len(growths) < 8, f"memory grew in every storm: {growths}"
        memory = [private_bytes(process) for process in processes]
        storm(208 + 104 * len(growths))
        growths.append([private_bytes(p) / before - 1 for p, before in zip(processes, memory, strict=True)])
    assert complete(server, "the code")["choices"][0]["finish_reason"] == "length"


def test_losing_nats_changes_nothing_for_requests(server: Serving, subject: Subject) -> None:
    nats = next(process for process in server.children() if "nats-server" in process.name())
    prompt = make_prompt(40, seed=80)
    nats.kill()
    for _ in range(5):
        assert complete(server, list(prompt))["choices"][0]["token_ids"] == expected_tokens(subject, prompt)
    assert server.get("/ready").status_code == 200
    server_processes = server.children
    deadline = time.monotonic() + 20
    while not any("nats-server" in process.name() for process in server_processes()):
        assert time.monotonic() < deadline, "the supervisor did not start NATS again"
        time.sleep(0.1)


def test_sigterm_under_load_finishes_what_runs(subject: Subject) -> None:
    """Requests that were accepted end as if nothing had happened; then everything is gone, with status 0."""
    slow = ("--failpoints", "decode.step_n=delay(5)")  # three seconds on any machine: long enough to be seen running
    with serving("--model", str(subject.path), *OPTIONS, "--mode", "colocated", *slow) as server:
        body = {"model": "tiny", "prompt": "the code", "max_tokens": 600, "ignore_eos": True, "temperature": 0}
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while sum(worker["running"] for worker in server.workers()) < 4:
            assert time.monotonic() < deadline, "the requests do not run"
            time.sleep(0.02)
        tree = server.children()
        assert server.stop(signal.SIGTERM) == 0
        for thread in threads:
            thread.join(30)
        assert [answer.status_code for answer in answers] == [200] * 4
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {600}
        assert not psutil.wait_procs(tree, timeout=5)[1]
    assert not [line for line in server.lines if "leaked" in line]  # by libraries, at the very end


def test_seeded_sampling_is_the_same_in_both_topologies(server: Serving, subject: Subject) -> None:
    """Alone, and among others: a draw depends on seed and position alone."""
    prompts = [list(make_prompt(length, seed=81)) for length in (5, 16, 33, 100, 200)]
    settings = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1, "presence_penalty": 0.3}

    def ask(target: Serving, index: int) -> list[int]:
        answer = complete(target, prompts[index], seed=1000 + index, **settings)
        return list(answer["choices"][0]["token_ids"])

    def ask_all_at_once(target: Serving) -> list[list[int]]:
        results: dict[int, list[int]] = {}
        threads = [
            threading.Thread(target=lambda i=i: results.__setitem__(i, ask(target, i))) for i in range(len(prompts))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[i] for i in range(len(prompts))]

    alone = [ask(server, index) for index in range(len(prompts))]
    assert ask_all_at_once(server) == alone
    with serving("--model", str(subject.path), *OPTIONS, "--mode", "colocated") as colocated:
        assert [ask(colocated, index) for index in range(len(prompts))] == alone
        assert ask_all_at_once(colocated) == alone


def test_what_cannot_be_served_is_refused_in_one_line_with_status_2(tmp_path: Path) -> None:
    with serving("--model", str(tmp_path / "nothing"), wait=False) as server:
        assert server.process.wait(60) == 2
        assert any("nothing" in line for line in server.lines)
        assert not any("Traceback" in line for line in server.lines)


def test_a_damaged_model_is_refused_naming_file_and_tensor(subject: Subject, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(subject.path, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with serving("--model", str(damaged), wait=False) as server:
        assert server.process.wait(90) == 2
        refusals = [line for line in server.lines if "model.safetensors" in line]
        assert refusals
        assert not any("Traceback" in line for line in server.lines)


def test_a_port_in_use_is_one_line_and_status_2(server: Serving) -> None:
    with serving("--port", str(server.port), wait=False) as second:
        assert second.process.wait(30) == 2
        assert len([line for line in second.lines if str(server.port) in line]) == 1
        assert not any("Traceback" in line for line in second.lines)


@pytest.mark.parametrize("phase", ["starting prefill-0", "NATS is ready"])
def test_sigterm_while_loading_leaves_nothing_and_exits_0(subject: Subject, phase: str) -> None:
    with serving("--model", str(subject.path), *OPTIONS, wait=False) as server:
        eventually_sync(lambda: any(phase in line for line in server.lines), timeout_s=30, what=phase)
        tree = server.children()
        assert server.stop(signal.SIGTERM) == 0
        assert not psutil.wait_procs(tree, timeout=5)[1]
