"""What a worker process takes from the world around it, in one place, so that a simulation can give it another world."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from baton.kvtransfer.transport.sockets import SYSTEM_SOCKETS, Sockets
from baton.services.core.router import Role
from baton.services.runtime import grpc as runtime_grpc
from baton.services.worker.step_loop import StepLoop


@dataclass(frozen=True, slots=True)
class Environment:
    """Time, identity, network, and where steps run. The defaults are the real ones."""

    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time  # seconds since 1970; to tell which of two processes began later
    new_incarnation: Callable[[], str] = lambda: uuid.uuid4().hex
    create_server: Callable[[], grpc.aio.Server] = runtime_grpc.create_server
    open_channel: Callable[[str], grpc.aio.Channel] = runtime_grpc.create_channel
    sockets: Sockets = SYSTEM_SOCKETS
    step_loop: type[StepLoop[Any]] = StepLoop
    # How a worker becomes one of another role, within so many seconds. None: it cannot.
    change_role: Callable[[Role, float], None] | None = None
    # How a stuck worker ends its process. None: nobody watches, as where several workers share one.
    end_process: Callable[[int], None] | None = None
