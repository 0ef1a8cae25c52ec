"""One process of the installation under test: started, signalled, watched, started again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from baton.services.runtime.process import PARENT_PID_VARIABLE

_KILL_AFTER_S = 60.0


class ManagedProcess:
    """A command that can run several times, one after the other. Its output goes to ``log``, all runs into one file."""

    def __init__(self, name: str, argv: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.name, self.argv, self.log = name, list(argv), log
        self._env = env or {}
        self._process: asyncio.subprocess.Process | None = None
        self.num_starts = 0

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def exit_status(self) -> int | None:
        return None if self._process is None else self._process.returncode

    async def start(self) -> None:
        assert not self.is_running, f"{self.name} is running"
        self.num_starts += 1
        # PYTHONPATH holds the tests' own folder, whose names are nobody else's business.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("BATON_") and k != "PYTHONPATH"}
        own = {PARENT_PID_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": "1", **self._env}
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self.argv,
                env={**inherited, **own},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self.is_running:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def wait(self, timeout_s: float = _KILL_AFTER_S) -> int:
        """Waits for its end and returns the exit status."""
        assert self._process is not None
        async with asyncio.timeout(timeout_s):
            return await self._process.wait()

    async def kill(self) -> None:
        if self.is_running:
            self.signal(signal.SIGKILL)
            await self.wait()

    async def end(self) -> int | None:
        """Asks it to drain; kills it when it does not. Returns the exit status."""
        if self.is_running:
            self.signal(signal.SIGCONT)  # a stopped one hears nothing else
            self.signal(signal.SIGTERM)
            try:
                return await self.wait()
            except TimeoutError:
                await self.kill()
        return self.exit_status

    def private_bytes(self) -> int:
        """Memory that it shares with nobody."""
        return int(psutil.Process(self.pid).memory_full_info().uss)

    def log_tail(self, num_lines: int = 15) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])
        except OSError:
            return ""
