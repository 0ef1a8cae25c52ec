"""What every test gets: seeds, no child process left behind, and the shared fixtures."""

from __future__ import annotations

import os

# The kernels' tests need Triton's interpreter, which is chosen when triton is first imported: by any test that comes
# before them. Nothing else is changed by it: the interpreter runs only where it is asked for.
os.environ.setdefault("TRITON_INTERPRET", "1")

import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
import structlog
from helpers.waiting import eventually_sync

# A test process shares two cores with others: an example that took long says nothing.
hypothesis.settings.register_profile("baton", deadline=None, print_blob=True)
hypothesis.settings.load_profile("baton")

# As the processes log. structlog's own default prints local variables, which takes minutes where one is a large message.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)

_CHILDREN_END_S = 5.0
# Folders whose files share a server that takes seconds to start: they are run by one test process.
_TOGETHER = ("tests/conformance/",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``, but for the folders of ``_TOGETHER``, which count as one file."""
    from xdist.scheduler import LoadFileScheduling

    class LoadFolderScheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in _TOGETHER if folder in nodeid), nodeid.split("::", 1)[0])

    return LoadFolderScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def seeded() -> None:
    """pytest-randomly seeds ``random`` and numpy for each test; torch gets its seed from there."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(random.getrandbits(63))


@pytest.fixture(autouse=True)
def no_child_left_behind() -> Iterator[None]:
    """Fails the test that leaves a process behind, and ends the process."""
    before = _children()
    yield
    try:
        eventually_sync(
            lambda: not _children() - before, timeout_s=_CHILDREN_END_S, what="the end of the test's child processes"
        )
    except AssertionError:
        left = [psutil.Process(pid) for pid in _children() - before if psutil.pid_exists(pid)]
        commands = [" ".join(process.cmdline()) for process in left]
        for process in left:
            process.kill()
        pytest.fail(f"child processes are left: {commands}")


@pytest.fixture
def make_model_dir(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small random model of a family (a key of ``helpers.tiny_models.FAMILIES``) and returns its folder."""

    def make(family: str, **overrides: object) -> Path:
        from helpers.tiny_models import make_model_dir

        return make_model_dir(family, tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}", **overrides)  # type: ignore[arg-type]

    return make


def _children() -> set[int]:
    """Direct children that run. The kernel's own list where there is one: psutil reads every process of the machine."""
    children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children")
    if not children.exists():
        return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}
    pids: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            pids |= {int(pid) for pid in Path(f"/proc/self/task/{task}/children").read_text().split()}
        except OSError:  # the thread has just ended
            continue
    return {pid for pid in pids if _runs(pid)}


def _runs(pid: int) -> bool:
    """Neither gone nor a zombie that waits to be reaped; multiprocessing's own helper lives as long as the process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return state != "Z" and b"multiprocessing.resource_tracker" not in command
