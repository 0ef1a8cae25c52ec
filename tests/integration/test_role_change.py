"""A worker that changes its role while requests run: none fails, and none gets other tokens."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import httpx
import pytest
from helpers.oracle import Subject, expected_tokens, make_prompt, make_subject
from helpers.serving import Serving, baton, serving

OPTIONS = ("--kv-cache-memory", "32MiB", "--max-num-seqs", "32", "--dtype", "float32", "--served-model-name", "tiny")
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(subject: Subject) -> Iterator[Serving]:
    with serving("--model", str(subject.path), "--decode", "2", "--admin-port", "0", *OPTIONS) as running:
        running.wait_for_workers(3)
        yield running


class Load(threading.Thread):
    """Asks for answers, one after the other, until it is told to stop."""

    def __init__(self, server: Serving, prompt: list[int], expected: list[int]) -> None:
        super().__init__()
        self.num_right = 0
        self.problems: list[str] = []
        self._server, self._prompt, self._expected = server, prompt, expected
        self._is_over = threading.Event()

    def run(self) -> None:
        body = {
            "model": "tiny", "prompt": self._prompt, "max_tokens": len(self._expected), "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        while not self._is_over.is_set():
            response = self._server.post("/v1/completions", body)
            if response.status_code != 200:
                self.problems.append(f"{response.status_code}: {response.text}")
            elif response.json()["choices"][0]["token_ids"] != self._expected:
                self.problems.append("other tokens")
            else:
                self.num_right += 1

    def stop(self) -> None:
        self._is_over.set()
        self.join(TIMEOUT_S)


def change(server: Serving, worker_id: str, role: str) -> dict[str, str]:
    response = server.post(f"/v1/workers/{worker_id}/role?role={role}&timeout_s=60", None, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    return dict(response.json())


def admin_url(server: Serving) -> str:
    """As the banner says."""
    shown = (re.search(r"admin\s+(http://127\.0\.0\.1:\d+) ", line) for line in server.lines)
    return next(found[1] for found in shown if found is not None)


def said(*arguments: str) -> tuple[int, str]:
    """A command's status, and what it says."""
    done = baton(*arguments)
    return done.returncode, (done.stdout + done.stderr).strip()


def roles(server: Serving) -> dict[str, str]:
    return {worker["id"]: worker["role"] for worker in server.workers()}


def test_a_worker_changes_its_role_there_and_back_under_load(server: Serving, subject: Subject) -> None:
    prompts = [make_prompt(length, seed=length) for length in (5, 40, 130)]
    loads = [Load(server, list(prompt), expected_tokens(subject, prompt)) for prompt in prompts]
    before = {worker["id"]: worker for worker in server.workers()}
    for load in loads:
        load.start()
    try:
        changed = change(server, "decode-1", "prefill")
        assert roles(server) == {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "prefill"}
        after = {worker["id"]: worker for worker in server.workers()}
        assert changed["incarnation"] == after["decode-1"]["incarnation"] != before["decode-1"]["incarnation"]
        assert after["decode-1"]["pid"] == before["decode-1"]["pid"]
        assert after["decode-1"]["address"] == before["decode-1"]["address"]
        assert change(server, "decode-1", "prefill")["state"] == "unchanged"
        assert change(server, "decode-1", "decode")["state"] == "changed"
        assert roles(server) == {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
    finally:
        for load in loads:
            load.stop()
    assert [problem for load in loads for problem in load.problems] == []
    assert all(load.num_right for load in loads)
    server.assert_clean(60.0)


def test_the_last_decode_worker_stays_one(server: Serving) -> None:
    assert change(server, "decode-1", "prefill")["state"] == "changed"
    response = server.post("/v1/workers/decode-0/role?role=prefill", None)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "role")
    assert server.post("/v1/workers/nobody/role?role=prefill", None).status_code == 404
    assert server.post("/v1/workers/decode-1/role?role=planner", None).status_code == 400
    assert said("role", "decode-1", "decode", "--url", admin_url(server)) == (0, "decode-1 is now a decode worker")
    assert roles(server) == {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}


def test_the_commands_of_operators_have_a_listener_of_their_own(server: Serving) -> None:
    url = admin_url(server)
    assert httpx.get(f"{url}/v1/workers", timeout=TIMEOUT_S).json()["data"]
    assert httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"}).status_code == 404
    status, words = said("blocks", "--url", url)
    assert (status, words.splitlines()[-1]) == (0, "0 block(s) held")
    status, words = said("role", "nobody", "decode", "--url", url)
    assert status == 1
    assert "There is no worker" in words
