"""One child process of the supervisor: start, watch, end. Whether to start it again is the supervisor's decision."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from baton.services.runtime.process import PARENT_PID_VARIABLE
from baton.services.runtime.settings_loader import PROBLEM_FILE_VARIABLE

# -P: the working directory is no place to import from; in a clone it has a folder "kernels", which libraries look for too.
_PYTHON = (sys.executable, "-P", "-m")


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run. ``name`` is unique within the supervisor."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


def baton_argv(*args: str) -> list[str]:
    """Runs one of our own commands with this interpreter."""
    return [*_PYTHON, "baton.services.local", *args]


def program_argv(program: Path, *args: str) -> list[str]:
    """Runs a foreign program that ends with this process too."""
    return [*_PYTHON, "baton.services.runtime.exec_child", str(program), *args]


class Child:
    """A running or ended process."""

    def __init__(self, spec: ChildSpec, directory: Path) -> None:
        self.spec = spec
        self._problem_file = directory / f"{spec.name}.problems"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return None if self._process is None else self._process.returncode

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        self._problem_file.unlink(missing_ok=True)
        # Options come as flags: variables meant for the supervisor must not reach, and overrule, its children.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
        own = {PARENT_PID_VARIABLE: str(os.getpid()), PROBLEM_FILE_VARIABLE: str(self._problem_file)}
        self._process = await asyncio.create_subprocess_exec(
            *self.spec.argv,
            env={**inherited, **self.spec.env, **own},
            stdin=asyncio.subprocess.DEVNULL,
            # A session of its own: Ctrl-C in the terminal reaches the supervisor alone, which ends the children in order.
            start_new_session=True,
        )

    async def wait(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    def take_problems(self) -> list[str]:
        """What it had to say about its settings when it refused to start."""
        try:
            return self._problem_file.read_text(encoding="utf-8").splitlines()
        except OSError:
            return []

    def terminate(self) -> None:
        """Asks it to drain."""
        if self.is_running and self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        if self.is_running and self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def end(self, timeout_s: float) -> bool:
        """Drains it, and kills it when ``timeout_s`` are over. True when it drained with status 0."""
        if self._process is None:
            return True
        self.terminate()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._process.wait()
        finally:  # also when we are cancelled
            self.kill()
        return await self._process.wait() == 0
