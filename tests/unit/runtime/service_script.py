"""A service whose steps can be slow or broken, run by test_main.py. Arguments: a mode, a file that gets its steps."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time

from baton.services.core.errors import ConfigurationError
from baton.services.runtime import main, process
from baton.services.runtime.main import run_service
from baton.services.runtime.settings import ServeSettings


class Scripted:
    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._failed = asyncio.Event()

    async def start(self) -> None:
        step("start")
        if self._mode == "refuse":
            raise ConfigurationError("model.safetensors: tensor x expected [2], found [3]")
        if self._mode == "load":
            await asyncio.to_thread(time.sleep, 60)  # weights: a thread that cannot be interrupted
        if self._mode == "fail":
            asyncio.get_running_loop().call_soon(self._failed.set)
        if self._mode == "collector":
            step(f"collects {gc.isenabled()}")
        step("started")

    async def wait_failed(self) -> None:
        if self._mode == "collector":
            step(f"collects {gc.isenabled()}")
        await self._failed.wait()
        raise RuntimeError("step loop died")

    async def drain(self) -> None:
        step("drain")
        if self._mode == "stubborn":
            await asyncio.Event().wait()
        step("drained")

    async def stop(self) -> None:
        step("stop")
        if self._mode == "stuck-loop":
            time.sleep(3600)
        if self._mode == "stuck-thread":
            asyncio.get_running_loop().run_in_executor(None, time.sleep, 3600)


def step(name: str) -> None:
    with open(sys.argv[2], "a", encoding="utf-8") as steps:
        steps.write(f"{name}\n")


if __name__ == "__main__":
    process._SAME_REQUEST_S = float(os.environ.get("SAME_REQUEST_S", "0"))
    if sys.argv[1].startswith("stuck"):
        main._END_TIMEOUT_S = 0.5
    process.exit_cleanly_on_signals()
    process.die_with_parent()
    process.start_without_collector()
    step(f"pid {os.getpid()}")
    if sys.argv[1] == "import":
        step("importing")
        signal.pause()
    settings = ServeSettings(drain_timeout_s=0.2 if len(sys.argv) > 3 else 30.0)
    sys.exit(run_service("scripted", settings, lambda: Scripted(sys.argv[1])))
