"""The install steps of the images, in a fresh environment: the gateway's, which is quick since it has no torch."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[2] / "services" / "install.sh"


@pytest.fixture(scope="module")
def gateway_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The virtual environment of the gateway's image."""
    environment = tmp_path_factory.mktemp("image") / "venv"
    # Bytecode is for the image; making it takes a third of the time.
    variables = {**os.environ, "PYTHON": sys.executable, "PIP_COMPILE": "0"}
    result = subprocess.run(
        [INSTALL, "gateway", environment], env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return environment


def _bare_variables(**variables: str) -> dict[str, str]:
    """A container's: nothing of this process's environment but where programs are."""
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1", **variables}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_gateway_is_complete_and_has_no_torch(gateway_environment: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [gateway_environment / "bin" / "baton", "--version"],
        env=_bare_variables(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"baton \d+\.\d+\.\d+\n", result.stdout)
    program = (
        "import importlib.util, baton.services.gateway.__main__ as gateway;"
        "print(importlib.util.find_spec('torch'), gateway.__file__)"
    )
    result = subprocess.run(
        [gateway_environment / "bin" / "python", "-c", program],
        env=_bare_variables(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    torch, file = result.stdout.split()
    assert torch == "None"
    assert Path(file).is_relative_to(gateway_environment)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_gateway_serves_until_it_is_told_to_stop(gateway_environment: Path, tmp_path: Path) -> None:
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    variables = _bare_variables(BATON_NATS_URL="none", BATON_PORT=ports[0], BATON_GRPC_PORT=ports[1])
    log = tmp_path / "log"
    with log.open("wb") as output:
        gateway = subprocess.Popen(
            [gateway_environment / "bin" / "baton", "gateway"],
            env=variables,
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        )
    try:
        check = [str(gateway_environment / "bin" / "python"), "-m", "baton.services.healthcheck", "http"]
        # Each check takes the time that Python needs to start; a gateway that ends instead is noticed.
        while gateway.poll() is None:
            if subprocess.run(check, env=variables, cwd=tmp_path, capture_output=True, check=False).returncode == 0:
                break
        assert gateway.poll() is None, log.read_text(encoding="utf-8")
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait() == 0, log.read_text(encoding="utf-8")
    finally:
        if gateway.poll() is None:
            gateway.kill()
            gateway.wait()
