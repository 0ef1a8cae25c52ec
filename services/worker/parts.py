"""What a worker of either kind is made from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.block_hash import BlockNamer
from baton.services.core.block_pool import BlockPool
from baton.services.core.scheduler.base import SchedulerLimits
from baton.services.core.scheduler.pace import Pace
from baton.services.engine.grammar import GrammarCompiler
from baton.services.worker.step_loop import StepEngine, StepLoop


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """Made by the host once the model is loaded; the worker builds its scheduler on top."""

    identity: pb.WorkerIdentity
    pool: BlockPool
    limits: SchedulerLimits
    engine: StepEngine
    namer: BlockNamer
    vocab_size: int
    prefix_caching: bool
    grammars: GrammarCompiler | None = None  # the engine's; None: it knows none
    pace: Pace = field(default_factory=Pace)  # as far as a warm-up measured it
    clock: Callable[[], float] = time.monotonic
    step_loop: type[StepLoop[Any]] = StepLoop
