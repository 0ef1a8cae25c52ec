"""The watchdog's thread: it runs beside a stuck step thread and a stuck event loop, and says why it ends the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable

from helpers.waiting import eventually

from baton.services.core.watchdog import WatchdogLimits
from baton.services.worker.watchdog import STUCK_STATUS, WatchdogThread

LIMITS = WatchdogLimits(stuck_after_s=0.6)


class Ends:
    """What a watchdog did, in place of ending this process."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.reasons: list[str] = []
        self.ended = threading.Event()

    def end(self, status: int) -> None:
        self.statuses.append(status)
        self.ended.set()

    def watchdog(self, num_turns: Callable[[], int], *, is_thread_alive: bool = True) -> WatchdogThread:
        return WatchdogThread(
            LIMITS,
            loop=asyncio.get_running_loop(),
            num_turns=num_turns,
            is_thread_alive=lambda: is_thread_alive,
            expected_step_s=lambda: 0.0,
            on_stuck=self.reasons.append,
            end=self.end,
        )


def counter() -> Callable[[], int]:
    """Turns each time it is looked at."""
    return iter(range(1_000_000)).__next__


async def test_a_stuck_step_thread_is_told_and_ends_the_process() -> None:
    ends = Ends()
    watchdog = ends.watchdog(lambda: 7)
    watchdog.start()
    await eventually(lambda: bool(ends.statuses), timeout_s=30.0, what="the end")
    watchdog.stop()
    assert ends.statuses == [STUCK_STATUS]
    assert ends.reasons[0].startswith("no step ended for")


async def test_a_stuck_event_loop_ends_the_process_without_its_help() -> None:
    ends = Ends()
    watchdog = ends.watchdog(counter())
    watchdog.start()
    assert ends.ended.wait(30.0)  # blocks the loop that it runs on
    watchdog.stop()
    assert ends.statuses == [STUCK_STATUS]
    assert ends.reasons == []
    await asyncio.sleep(0)
    assert ends.reasons[0].startswith("the event loop did not turn")


async def test_a_step_thread_that_has_ended_ends_the_process() -> None:
    ends = Ends()
    watchdog = ends.watchdog(counter(), is_thread_alive=False)
    watchdog.start()
    await eventually(lambda: bool(ends.statuses), timeout_s=30.0, what="the end")
    watchdog.stop()
    assert ends.reasons == ["the step thread has ended"]


async def test_a_stopped_watchdog_lets_the_step_thread_end() -> None:
    ends = Ends()
    is_alive = threading.Event()
    is_alive.set()
    watchdog = WatchdogThread(
        LIMITS,
        loop=asyncio.get_running_loop(),
        num_turns=counter(),
        is_thread_alive=is_alive.is_set,
        expected_step_s=lambda: 0.0,
        on_stuck=ends.reasons.append,
        end=ends.end,
    )
    watchdog.start()
    watchdog.stop()
    is_alive.clear()
    await eventually(lambda: not watchdog._thread.is_alive(), timeout_s=30.0, what="the end of the thread")
    assert ends.statuses == []


def test_the_process_ends_with_the_stacks_of_all_threads_in_its_log() -> None:
    script = (
        "import asyncio, threading\n"
        "from baton.services.core.watchdog import WatchdogLimits\n"
        "from baton.services.worker.watchdog import WatchdogThread\n"
        "def a_step_that_never_ends():\n    threading.Event().wait()\n"
        "async def main():\n"
        "    step = threading.Thread(target=a_step_that_never_ends)\n"
        "    step.start()\n"
        "    WatchdogThread(WatchdogLimits(0.5), loop=asyncio.get_running_loop(), num_turns=lambda: 0,\n"
        "        is_thread_alive=step.is_alive, expected_step_s=lambda: 0.0, on_stuck=print).start()\n"
        "    await asyncio.sleep(3600)\n"
        "asyncio.run(main())\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == STUCK_STATUS
    assert "in a_step_that_never_ends" in run.stderr
    assert "no step ended for" in run.stdout
