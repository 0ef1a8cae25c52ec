"""The scripts that the chart mounts: the model's download and the release's test."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.charts.loading import load_script
from tests.charts.render import CHART

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}


# --------------------------------------------------------------------------------------------------------------- download


@dataclass
class FakeHub:
    """What the script uses of huggingface_hub."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    downloads: list[dict[str, Any]] = field(default_factory=list)
    reachable: bool = True

    def snapshot_download(self, repository: str, *, local_dir: Path, **options: Any) -> None:
        self.downloads.append({"repository": repository, **options})
        if not self.reachable:
            raise OSError("the hub cannot be reached")
        for name, content in self.files.items():
            if name.endswith(".json") or "*.safetensors" in options["allow_patterns"]:
                (local_dir / name).write_bytes(content)

    def model_info(self, repository: str, *, revision: str, files_metadata: bool) -> Any:
        assert files_metadata
        large = [SimpleNamespace(sha256=hashlib.sha256(FILES["model.safetensors"]).hexdigest())]
        return SimpleNamespace(
            siblings=[
                SimpleNamespace(rfilename="config.json", lfs=None),
                SimpleNamespace(rfilename="model.safetensors", lfs=large[0]),
            ]
        )


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def fetch(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    module = load_script(CHART / "files" / "fetch_model.py")
    monkeypatch.setattr(module, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(module, "HfApi", lambda: hub)
    fetch: Callable[..., str] = module.fetch
    return fetch


def test_a_download_is_verified_and_not_repeated(fetch: Callable[..., str], hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    assert fetch("org/m", "abc", folder, "all") == "downloaded, 1 files verified"
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert hub.downloads[0]["revision"] == "abc"
    hub.reachable = False
    assert fetch("org/m", "abc", folder, "all") == "already complete"
    # A gateway that shares the folder needs less than what is there.
    assert fetch("org/m", "abc", folder, "tokenizer") == "already complete"


def test_neither_code_nor_pickles_are_downloaded(fetch: Callable[..., str], hub: FakeHub, tmp_path: Path) -> None:
    fetch("org/m", "abc", tmp_path / "m", "all")
    patterns = hub.downloads[0]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not [pattern for pattern in patterns if pattern.endswith((".py", ".bin", ".pt", ".pth", "*"))]


def test_a_gateway_downloads_no_weights(fetch: Callable[..., str], hub: FakeHub, tmp_path: Path) -> None:
    assert fetch("org/m", "abc", tmp_path / "m", "tokenizer") == "downloaded, 0 files verified"
    assert "*.safetensors" not in hub.downloads[0]["allow_patterns"]
    # A worker that shares the folder goes on from there.
    assert fetch("org/m", "abc", tmp_path / "m", "all") == "downloaded, 1 files verified"


def test_a_wrong_checksum_is_refused_and_the_file_deleted(
    fetch: Callable[..., str], hub: FakeHub, tmp_path: Path
) -> None:
    hub.files["model.safetensors"] = b"other"
    with pytest.raises(ValueError, match=r"model\.safetensors: expected SHA-256 .*; deleted"):
        fetch("org/m", "abc", tmp_path / "m", "all")
    assert not (tmp_path / "m" / "model.safetensors").exists()
    hub.files = dict(FILES)
    assert fetch("org/m", "abc", tmp_path / "m", "all") == "downloaded, 1 files verified"


def test_a_damaged_folder_is_downloaded_again(fetch: Callable[..., str], tmp_path: Path) -> None:
    fetch("org/m", "abc", tmp_path / "m", "all")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"cut")
    assert fetch("org/m", "abc", tmp_path / "m", "all") == "downloaded, 1 files verified"


def test_pods_that_share_a_folder_download_once(fetch: Callable[..., str], hub: FakeHub, tmp_path: Path) -> None:
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch("org/m", "abc", tmp_path / "m", "all"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["already complete"] * 3 + ["downloaded, 1 files verified"]
    assert len(hub.downloads) == 1


def test_a_failure_is_one_line_and_a_bad_exit(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = load_script(CHART / "files" / "fetch_model.py")
    hub.reachable = False
    monkeypatch.setattr(module, "snapshot_download", hub.snapshot_download)
    for name, value in {"REPOSITORY": "org/m", "REVISION": "abc", "DIRECTORY": str(tmp_path), "FILES": "all"}.items():
        monkeypatch.setenv(f"MODEL_{name}", value)
    assert module.main() == 1
    assert capsys.readouterr().err == "org/m@abc: the hub cannot be reached\n"


# -------------------------------------------------------------------------------------------------------------- helm test


@dataclass
class FakeGateway:
    """The gateway's API, as far as the test pod uses it."""

    url: str = ""
    not_ready: int = 0
    done: str = "[DONE]"
    completion_tokens: int = 3
    receipt: dict[str, Any] = field(
        default_factory=lambda: {
            "outcome": "stop",
            "decision": {"mode": "remote"},
            "transfer": {"bytes": 4096},
            "ttft_ms": 12.3,
        }
    )
    keys: set[str] = field(default_factory=set)

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
        if path == "/ready":
            self.not_ready -= 1
            return (200, "{}") if self.not_ready < 0 else (503, '{"error": {"message": "no decode worker"}}')
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "org/m"}]})
        if (method, path) == ("POST", "/v1/chat/completions"):
            assert body["model"] == "org/m"
            assert body["stream"] is True
            usage = {"prompt_tokens": 9, "completion_tokens": self.completion_tokens}
            events = [{"id": "chat-1", "choices": [{}]}, {"id": "chat-1", "choices": [], "usage": usage}]
            return 200, "".join(f"data: {text}\n\n" for text in [*map(json.dumps, events), self.done])
        if path == "/v1/requests/chat-1":
            return 200, json.dumps(self.receipt)
        return 404, '{"error": {"message": "not here"}}'


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    fake = FakeGateway()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fake.keys.add(self.headers.get("Authorization", ""))
            code, text = fake.answer(self.command, self.path, json.loads(body) if body else {})
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_port}"
        yield fake
        server.shutdown()
        thread.join()


def _run(url: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with nothing but the standard library: as in the pod."""
    return subprocess.run(
        [sys.executable, "-I", str(CHART / "files" / "smoke_test.py")],
        env={"GATEWAY_URL": url, "TIMEOUT_S": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_working_gateway_passes(gateway: FakeGateway, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first\nsecond\n", encoding="utf-8")
    result = _run(gateway.url, API_KEY_FILE=str(tmp_path / "keys"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "org/m: 3 tokens, remote prefill, 4096 bytes moved, first token after 12 ms\n"
    assert gateway.keys == {"Bearer first"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"done": "{}"}, "the stream ended with '{}', not [DONE]"),
        ({"completion_tokens": 0}, "usage counts no completion tokens"),
        ({"receipt": {"outcome": "error"}}, "the receipt's outcome is 'error'"),
        ({"receipt": {"outcome": "stop", "decision": {"mode": "remote"}, "transfer": {"bytes": 0}}}, "moved no bytes"),
        ({"receipt": {"outcome": "stop"}}, "KeyError: 'decision'"),
        ({"not_ready": 9}, "the gateway is not ready: GET /ready: 503"),
    ],
)
def test_a_broken_gateway_fails(gateway: FakeGateway, fault: dict[str, Any], message: str) -> None:
    for name, value in fault.items():
        setattr(gateway, name, value)
    result = _run(gateway.url)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_gateway_that_is_not_there_fails() -> None:
    result = _run("http://127.0.0.1:1")
    assert result.returncode == 1
    assert "the gateway is not ready" in result.stderr


def test_a_gateway_that_becomes_ready_is_waited_for(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_script(CHART / "files" / "smoke_test.py")
    monkeypatch.setattr(module, "_RETRY_S", 0.0)
    gateway.not_ready = 2
    test = module.SmokeTest(gateway.url, None, 10.0)
    test.wait_until_ready(deadline=float("inf"))
    assert gateway.not_ready == -1
    test._connection.close()
