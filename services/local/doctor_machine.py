"""What ``baton doctor`` looks at on this machine: Python, libraries, NATS, ports, memory, descriptors, devices, leftovers."""

from __future__ import annotations

import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from baton.services.core.errors import ConfigurationError
from baton.services.local.doctor import Check, Finding, Level, Questions
from baton.services.local.gateway_client import GatewayClient, GatewayUnreachable
from baton.services.local.nats_server import find_nats_server
from baton.services.local.private_directory import abandoned_directories
from baton.services.runtime.cores import num_cores
from baton.services.runtime.net import format_address, port_problem

_MIN_PYTHON = (3, 11)
# A connection for each stream, and a few for each worker.
_MIN_FILES = 1024
_GOOD_FILES = 8192
_MIN_SHM_BYTES = 64 << 20
_SHM = Path("/dev/shm")  # noqa: S108  looked at, not written to
_OUR_NAMES = ("baton", "torch_")
_MEMINFO = Path("/proc/meminfo")
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
_CGROUP_MEMORY_USED = Path("/sys/fs/cgroup/memory.current")


def check_python(_: Questions) -> Iterator[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {num_cores()} core(s)"
    if sys.version_info < _MIN_PYTHON:
        yield Finding("python", Level.FAIL, found, "Baton needs Python 3.11 or later")
    elif sys.platform != "linux":
        yield Finding("python", Level.WARN, found, "Baton is tested on Linux; shared memory between workers needs it")
    else:
        yield Finding("python", Level.OK, found)


def check_libraries(_: Questions) -> Iterator[Finding]:
    """What pyproject.toml asks for, against what is installed."""
    from packaging.requirements import Requirement

    problems, num_checked = [], 0
    for text in metadata.requires("baton-llm") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        num_checked += 1
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing ({requirement.specifier or 'any version'})")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} is not {requirement.specifier}")
    version = metadata.version("baton-llm")
    if problems:
        yield Finding("libraries", Level.FAIL, "; ".join(problems), "pip install --upgrade baton-llm, or make setup")
    else:
        yield Finding(
            "libraries", Level.OK, f"baton {version}; {num_checked} libraries in the versions that it asks for"
        )


def check_device(_: Questions) -> Iterator[Finding]:
    """torch, and whether it sees a GPU that is there."""
    import torch

    from baton import kernels  # noqa: F401  its import is part of what must work

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Finding("device", Level.OK, f"torch {torch.__version__} with CUDA {torch.version.cuda}: {names}")
    elif Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        mend = "install a build of torch for CUDA: make serve VENV=/path/to/env TORCH=skip"
        yield Finding(
            "device", Level.WARN, f"an NVIDIA driver is here, but torch {torch.__version__} sees no GPU", mend
        )
    else:
        yield Finding("device", Level.OK, f"torch {torch.__version__} on the CPU; no GPU found")


def check_nats(_: Questions) -> Iterator[Finding]:
    try:
        program = find_nats_server()
    except ConfigurationError as error:
        yield Finding("nats", Level.FAIL, error.message, "clusters with a NATS of their own (--nats-url) do without it")
        return
    try:
        # The program that baton serve would start.
        run = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("nats", Level.FAIL, f"{program} does not run: {error}", "install nats-server again")
        return
    yield Finding("nats", Level.OK, f"{run.stdout.strip()} ({program})")


def check_ports(questions: Questions) -> Iterator[Finding]:
    """Free, or in use by a gateway of ours."""
    for port, option in ((questions.port, "--port"), (questions.grpc_port, "--grpc-port")):
        problem = port_problem(questions.host, port, option)
        if problem is None:
            yield Finding(f"port {port}", Level.OK, f"free on {questions.host}")
        elif _is_gateway(questions):
            yield Finding(f"port {port}", Level.OK, "in use by a running gateway")
        else:
            yield Finding(f"port {port}", Level.FAIL, problem, f"choose another with {option}")


def check_shared_memory(_: Questions) -> Iterator[Finding]:
    """Block pools are nameless memory; torch and NIXL use /dev/shm."""
    if not _SHM.is_dir():
        yield Finding("shared memory", Level.WARN, f"there is no {_SHM}", "mount a tmpfs there")
        return
    usage = shutil.disk_usage(_SHM)
    names = [path.name for path in _SHM.iterdir() if path.name.startswith(_OUR_NAMES)]
    found = f"{_SHM} has {size_words(usage.free)} of {size_words(usage.total)} free"
    if usage.free < _MIN_SHM_BYTES:
        mend = "enlarge it: docker run --shm-size=1g, or an emptyDir with medium Memory"
        yield Finding("shared memory", Level.WARN, found, mend)
    else:
        yield Finding("shared memory", Level.OK, found)
    if names:
        shown = ", ".join(sorted(names)[:5])
        found = f"{len(names)} file(s) in {_SHM}: {shown}"
        yield Finding("shared memory", Level.WARN, found, "remove them if no process uses them")


def check_leftovers(_: Questions) -> Iterator[Finding]:
    """Directories of installations that were killed."""
    left = list(abandoned_directories())
    if left:
        shown = ", ".join(str(path) for path in left[:3])
        found = f"{len(left)} of killed installations: {shown}"
        yield Finding("leftovers", Level.WARN, found, "the next baton serve removes them")
    else:
        yield Finding("leftovers", Level.OK, f"none in {tempfile.gettempdir()}")


def check_memory(questions: Questions) -> Iterator[Finding]:
    available = available_memory()
    if available is None:
        yield Finding("memory", Level.WARN, "cannot be read here")
        return
    # One pool in each of two workers.
    needed = 2 * questions.kv_cache_bytes
    caches = f"two KV caches of {size_words(questions.kv_cache_bytes)} need {size_words(needed)}"
    found = f"{size_words(available)} available; {caches}"
    if needed > available:
        yield Finding("memory", Level.FAIL, found, "lower --kv-cache-memory")
    else:
        yield Finding("memory", Level.OK, found)


def check_descriptors(_: Questions) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft:,} file descriptors for a process (hard limit {hard:,})"
    if soft < _MIN_FILES:
        yield Finding("descriptors", Level.FAIL, found, f"ulimit -n {_GOOD_FILES}")
    elif soft < _GOOD_FILES:
        mend = f"each stream takes one: ulimit -n {_GOOD_FILES} for more than {soft // 2:,} at once"
        yield Finding("descriptors", Level.WARN, found, mend)
    else:
        yield Finding("descriptors", Level.OK, found)


def available_memory() -> int | None:
    """Bytes that a new process may take: what the machine has, or what a container has left."""
    try:
        lines = dict(line.split(":") for line in _MEMINFO.read_text(encoding="utf-8").splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit, used = (int(path.read_text(encoding="utf-8")) for path in (_CGROUP_MEMORY, _CGROUP_MEMORY_USED))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return available
    return min(available, max(0, limit - used))


def _is_gateway(questions: Questions) -> bool:
    """At the URL, where that says the port, as it does under TLS."""
    host, port = questions.host, questions.port
    url = questions.url if urlsplit(questions.url).port == port else f"http://{format_address(host, port)}"
    try:
        answer = GatewayClient.from_url(url, api_key=questions.api_key, timeout_s=2.0).get("/")
    except (GatewayUnreachable, ValueError):
        return False
    return isinstance(answer.body, dict) and answer.body.get("name") == "baton"


def size_words(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


MACHINE_CHECKS: tuple[Check, ...] = (
    check_python,
    check_libraries,
    check_device,
    check_nats,
    check_ports,
    check_shared_memory,
    check_leftovers,
    check_memory,
    check_descriptors,
)
