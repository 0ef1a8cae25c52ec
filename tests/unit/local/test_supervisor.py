"""baton serve over real NATS and stand-in processes: readiness, restarts, order of the end, and nobody left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers.waiting import eventually_sync

from baton.services.local.admin_door import AdminDoor, find_admin_door
from baton.services.local.bundled import with_model
from baton.services.local.cluster import LocalCluster
from baton.services.runtime.settings import ServeSettings

SCRIPT = Path(__file__).with_name("serve_stand_ins.py")


class Serving:
    """A running supervisor and the directory that its stand-ins share."""

    def __init__(self, directory: Path, options: dict[str, object]) -> None:
        self._directory = directory
        self._out, self._err = directory / "stdout", directory / "stderr"
        flags = {"port": 0, "grpc_port": 0, "drain_timeout_s": 5, **options}
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), json.dumps(flags), "0.02"],
                stdout=out,
                stderr=err,
                env={**os.environ, "STAND_IN_DIR": str(directory), "BATON_LOG_LEVEL": "warning"},
            )
        self.seen: set[psutil.Process] = set()

    def log(self) -> list[str]:
        path = self._directory / "log"
        return path.read_text().splitlines() if path.exists() else []

    def out(self) -> str:
        return self._out.read_text()

    def err(self) -> str:
        return self._err.read_text()

    def until_ready(self) -> Serving:
        eventually_sync(lambda: "Baton is ready" in self.out() or self.process.poll() is not None, timeout_s=30)
        assert "Baton is ready" in self.out(), self.err()
        self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self

    def until_logged(self, text: str, times: int = 1) -> Serving:
        eventually_sync(lambda: sum(text in line for line in self.log()) >= times, timeout_s=30, what=text)
        return self

    def until_told(self, text: str) -> Serving:
        eventually_sync(lambda: text in self.err(), timeout_s=30, what=text)
        return self

    def child(self, name: str) -> psutil.Process:
        pids = [int(line.split()[2]) for line in self.log() if line.startswith(f"{name} started")]
        return psutil.Process(pids[-1])

    def send(self, number: signal.Signals) -> Serving:
        self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        self.process.send_signal(number)
        return self

    def status(self) -> int:
        return self.process.wait(timeout=60)

    def argv(self, name: str) -> list[str]:
        return (self._directory / f"{name}.argv").read_text().splitlines()

    def flag(self, name: str, flag: str) -> str:
        argv = self.argv(name)
        return argv[argv.index(flag) + 1]

    def environment(self, name: str) -> str:
        return (self._directory / f"{name}.env").read_text()


def survivors(processes: set[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(behaviour: dict[str, str] | None = None, **options: object) -> Serving:
        for name, do in (behaviour or {}).items():
            (tmp_path / f"{name}.do").write_text(do)
        started.append(Serving(tmp_path, options))
        return started[-1]

    yield start
    for serving in started:
        serving.process.kill()
        serving.process.wait()
        eventually_sync(lambda: not survivors(serving.seen), what="the children's end")  # noqa: B023


def test_serves_and_drains_gateway_then_workers_then_leaves_nothing(serve: Callable[..., Serving]) -> None:
    serving = serve(prefill=2, decode=1).until_ready()
    assert {line.split()[0] for line in serving.log()} == {"gateway", "prefill-0", "prefill-1", "decode-0"}
    assert len(serving.seen) == 5, "three workers, the gateway and NATS"
    (block_key,) = {
        serving.flag(name, "--block-key-file") for name in ("gateway", "prefill-0", "prefill-1", "decode-0")
    }
    secret_directory = Path(block_key).parent
    assert len(Path(block_key).read_bytes()) == 32
    assert secret_directory.stat().st_mode & 0o077 == 0
    serving.send(signal.SIGTERM)
    assert serving.status() == 0
    drained = [line.split()[0] for line in serving.log() if line.endswith("drained")]
    assert drained[0] == "gateway"
    assert sorted(drained[1:]) == ["decode-0", "prefill-0", "prefill-1"]
    assert not survivors(serving.seen)
    assert not secret_directory.exists()


def test_banner_has_urls_pools_and_a_streaming_request(serve: Callable[..., Serving]) -> None:
    banner = serve().until_ready().out()
    assert re.search(r"REST +http://127\.0\.0\.1:\d+/v1", banner)
    assert re.search(r"gRPC +127\.0\.0\.1:\d+", banner)
    assert "baton-demo  float32  up to 2,048 tokens" in banner
    assert "1,000 KV blocks x 16 tokens = 16,000 tokens" in banner
    (line,) = [line for line in banner.splitlines() if line.strip().startswith("curl")]
    body = json.loads(line[line.index("'{") + 1 : -1])
    assert body["stream"] is True
    assert "/v1/chat/completions" in line


def test_a_killed_worker_is_started_again(serve: Callable[..., Serving]) -> None:
    serving = serve().until_ready()
    serving.child("decode-0").kill()
    serving.until_logged("decode-0 started", times=2)
    assert "decode-0 was ended by signal 9; starting it again in 0.0 s" in serving.err()
    assert serving.process.poll() is None
    assert serving.send(signal.SIGTERM).status() == 0


def test_killed_nats_comes_back_on_its_port(serve: Callable[..., Serving]) -> None:
    serving = serve().until_ready()
    (nats,) = [p for p in serving.seen if "nats-server" in p.name()]
    nats.kill()
    serving.until_told("NATS was ended by signal 9")
    supervisor = psutil.Process(serving.process.pid)
    eventually_sync(lambda: any("nats-server" in p.name() for p in supervisor.children(recursive=True)), what="NATS")
    port = int(serving.flag("decode-0", "--nats-url").rpartition(":")[2])
    (nats,) = [p for p in supervisor.children(recursive=True) if "nats-server" in p.name()]
    serving.seen.add(nats)
    eventually_sync(lambda: [c for c in nats.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port])
    assert serving.log().count("decode-0 ready") == 1, "nobody else was restarted"
    assert serving.send(signal.SIGTERM).status() == 0


def test_a_worker_that_always_dies_ends_it_with_words(
    serve: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = serve({"prefill-0": "crash"})
    assert serving.status() == 1
    assert "prefill-0 ended with status 1, 6 times within a minute of its start; stopping" in serving.err()


def test_what_all_children_refuse_is_said_once_with_status_2(serve: Callable[..., Serving]) -> None:
    serving = serve({"prefill-0": "refuse", "decode-0": "refuse"})
    assert serving.status() == 2
    problems = [line for line in serving.err().splitlines() if not line.startswith("[")]
    assert problems == ["baton serve: model.safetensors: truncated"]


def test_a_second_signal_kills_what_does_not_drain(serve: Callable[..., Serving]) -> None:
    serving = serve({"decode-0": "ignore"}, drain_timeout_s=600).until_ready()
    serving.send(signal.SIGINT).until_logged("prefill-0 drained").send(signal.SIGINT)
    assert serving.status() == 128 + signal.SIGINT
    assert not survivors(serving.seen)


def test_a_signal_while_starting_ends_everything(serve: Callable[..., Serving]) -> None:
    serving = serve({"prefill-0": "hang"}, decode=2).until_logged("started", times=4)
    assert serving.send(signal.SIGTERM).status() == 0
    assert not survivors(serving.seen)
    assert "Baton is ready" not in serving.out()


def test_no_child_outlives_a_killed_supervisor(serve: Callable[..., Serving]) -> None:
    serving = serve({"decode-0": "ignore"}).until_ready()
    serving.send(signal.SIGKILL).process.wait()
    eventually_sync(lambda: not survivors(serving.seen), what="the children's end")


def test_keys_go_by_file_and_the_users_variables_stay_with_the_supervisor(serve: Callable[..., Serving]) -> None:
    serving = serve(api_key=["sesame", "other"]).until_ready()
    for name in ("gateway", "prefill-0", "decode-0"):
        assert not [argument for argument in serving.argv(name) if "sesame" in argument]
        assert "sesame" not in serving.environment(name)
        assert "BATON_LOG_LEVEL" not in serving.environment(name)
        assert serving.flag(name, "--log-level") == "warning"
    key_file = Path(serving.flag("gateway", "--api-key-file"))
    own_key, *keys = key_file.read_text().splitlines()
    assert (len(own_key), keys) == (64, ["sesame", "other"])
    assert key_file.stat().st_mode & 0o077 == 0
    assert "--api-key-file" not in serving.argv("decode-0")
    admin_key_file = Path(serving.flag("gateway", "--admin-key-file"))
    assert serving.flag("gateway", "--admin-port") == "0"
    assert admin_key_file.stat().st_mode & 0o077 == 0
    (admin_key,) = admin_key_file.read_text().splitlines()
    assert (len(admin_key), admin_key != own_key) == (64, True)
    Path(serving.flag("gateway", "--admin-url-file")).write_text("http://127.0.0.1:9")  # as a gateway would
    assert find_admin_door(f"http://127.0.0.1:{serving.flag('gateway', '--port')}") == AdminDoor(
        "http://127.0.0.1:9", admin_key
    )
    assert "authorization: Bearer $BATON_API_KEY" in serving.out()


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, set()),
        ({"admin_port": 0}, {"--admin-port", "--admin-url-file"}),
        ({"admin_port": 0, "admin_key_file": __file__}, {"--admin-port", "--admin-key-file"}),
        ({"host": "0.0.0.0", "allow_insecure_bind": True}, {"--admin-port", "--admin-key-file", "--admin-url-file"}),
    ],
)
def test_a_way_in_for_the_user_is_made_where_the_public_port_is_none(
    options: dict[str, object], flags: set[str]
) -> None:
    cluster = LocalCluster(with_model(ServeSettings.model_validate({"port": 0, "grpc_port": 0, **options})))
    try:
        assert {flag for flag in cluster._gateway().argv if flag.startswith("--admin")} == flags
    finally:
        cluster.remove_files()


def test_key_files_and_tenants_go_to_the_gateway_as_they_are(serve: Callable[..., Serving], tmp_path: Path) -> None:
    """It is the one that notices when they change. The supervisor asks it with a key of its own."""
    keys, tenants = tmp_path / "keys", tmp_path / "tenants.yaml"
    keys.write_text("sesame\n")
    tenants.write_text("tenants: []\n")
    serving = serve(api_key_file=[str(keys)], tenants_file=str(tenants)).until_ready()
    argv = serving.argv("gateway")
    given = [Path(argv[i + 1]) for i, argument in enumerate(argv) if argument == "--api-key-file"]
    assert given[1:] == [keys]
    assert len(given[0].read_text().splitlines()) == 1
    assert serving.flag("gateway", "--tenants-file") == str(tenants)
    assert "--tenants-file" not in serving.argv("decode-0")


def test_colocated_mode_starts_workers_that_do_both(serve: Callable[..., Serving]) -> None:
    serving = serve(mode="colocated", decode=2).until_ready()
    assert {line.split()[0] for line in serving.log()} == {"gateway", "colocated-0", "colocated-1"}
    assert serving.argv("colocated-0")[1] == "decode"
    assert serving.flag("colocated-0", "--role") == "colocated"


def test_two_installations_run_side_by_side(serve: Callable[..., Serving], tmp_path: Path) -> None:
    first = serve().until_ready()
    second_directory = tmp_path / "second"
    second_directory.mkdir()
    second = Serving(second_directory, {}).until_ready()
    assert first.flag("gateway", "--port") != second.flag("gateway", "--port")
    assert first.flag("gateway", "--nats-url") != second.flag("gateway", "--nats-url")
    assert second.send(signal.SIGTERM).status() == 0
    assert first.process.poll() is None
