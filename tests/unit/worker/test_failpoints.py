"""A worker with failpoints: which points its steps and its pool pass, and that it carries on where it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_model_dir
from helpers.worker_parts import BLOCK_SIZE, CountingEngine

from baton.services.core.block_state import Hold, Owner
from baton.services.core.failpoints import parse_failpoints
from baton.services.core.request import Request, SamplingParams
from baton.services.core.scheduler.base import ScheduledRequest
from baton.services.engine.engine import Engine
from baton.services.engine.loader import load_model
from baton.services.runtime import failpoints
from baton.services.runtime.failpoints import FailpointReached, clear_failpoints, set_failpoints
from baton.services.worker.failpoints import FailpointEngine, FailpointPool


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    clear_failpoints()


def put(text: str) -> None:
    set_failpoints(parse_failpoints(text))


def reached() -> dict[str, int]:
    assert failpoints._active is not None
    return dict(failpoints._active.failpoints.num_reached)


def make_item(*, computed: int, num_tokens: int, prompt: int = 10, output: int = 0) -> ScheduledRequest:
    tokens = list(range(100, 100 + prompt + output))
    request = Request("r", 1, tokens, prompt, SamplingParams(8), num_computed_tokens=computed)
    return ScheduledRequest(request, num_tokens)


def test_each_kind_of_step_passes_its_points() -> None:
    put("")
    engine = FailpointEngine(CountingEngine())
    every_step = {"engine.step_hang": 1, "engine.step_crash": 1, "engine.oom": 1}
    engine.step([make_item(computed=0, num_tokens=4)])
    assert reached() == every_step
    put("")
    engine.step([make_item(computed=4, num_tokens=4)])
    assert reached() == {**every_step, "prefill.between_chunks": 1}
    put("")
    engine.step([make_item(computed=10, num_tokens=1, output=1)])
    assert reached() == {**every_step, "decode.step_n": 1}


def test_a_step_with_a_prompt_passes_the_middle_of_the_model(tmp_path: Path) -> None:
    make_model_dir("llama", tmp_path)
    inner = Engine(load_model(tmp_path, dtype="float32", device="cpu"), num_blocks=4, block_size=BLOCK_SIZE)
    engine = FailpointEngine(inner)
    prompt = make_item(computed=0, num_tokens=10)
    prompt.request.block_table = [0, 1, 2]
    put("prefill.mid_layer=raise:token(105)")
    with pytest.raises(FailpointReached):
        engine.step([prompt])
    assert inner.progress.num_signs == inner.shape.num_layers // 2 + 1
    put("")
    engine.step([prompt])
    assert reached()["prefill.mid_layer"] == 1
    token = make_item(computed=10, num_tokens=1, output=1)
    token.request.block_table = [0, 1, 2]
    engine.step([token])
    assert reached()["prefill.mid_layer"] == 1


def test_a_token_of_any_request_in_the_batch_is_at_work() -> None:
    put("engine.step_crash=raise:token(109)")
    engine = FailpointEngine(CountingEngine())
    engine.step([make_item(computed=0, num_tokens=4, prompt=9)])
    with pytest.raises(FailpointReached):
        engine.step([make_item(computed=0, num_tokens=4, prompt=9), make_item(computed=0, num_tokens=4)])


def test_out_of_memory_is_the_engines_own_error() -> None:
    put("engine.oom=raise:once")
    inner = CountingEngine()
    engine = FailpointEngine(inner)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step([make_item(computed=0, num_tokens=4)])
    assert inner.num_steps == 0
    engine.step([make_item(computed=0, num_tokens=4)])
    assert inner.num_steps == 1


def test_a_pool_that_seems_exhausted_still_gives_what_it_promised() -> None:
    pool = FailpointPool(4, BLOCK_SIZE)
    assert pool.num_available == 4
    put("alloc.oom=raise")
    assert pool.num_available == 0
    blocks = pool.allocate(2, Hold(Owner.REQUEST, "r"))
    clear_failpoints()
    assert (len(blocks), pool.num_available) == (2, 2)
