"""The step: what it promises beside the right tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.engine_driver import Driver, make_request
from helpers.oracle import Subject, expected_tokens, make_prompt
from helpers.tiny_models import FAMILIES

from baton.services.core.scheduler.base import ScheduledRequest, StepResult
from baton.services.engine.engine import Engine
from baton.services.engine.loader import load_model


def test_an_empty_step(llama: Subject) -> None:
    assert llama.engine().step([]) == StepResult({}, {})


def test_loading_a_model_and_a_step_of_it_need_nothing_of_torchs_compiler(
    make_model_dir: Callable[..., Path],
) -> None:
    """Its import takes longer than all the rest of loading a small model, and a hundred megabytes."""
    folders = [str(make_model_dir(family)) for family in ("llama", "qwen3", "gpt2", "opt")]
    code = (
        "import sys\n"
        "from helpers.engine_driver import Driver, make_request\n"
        "from baton.services.engine.engine import Engine\n"
        "from baton.services.engine.loader import load_model\n"
        "for folder in sys.argv[1:]:\n"
        "    driver = Driver(Engine(load_model(folder, device='cpu'), num_blocks=8))\n"
        "    driver.step([(make_request(range(5, 25)), 20)])\n"
        "    assert driver.sampled\n"
        "print(*sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", code, *folders],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "\n"), run.stdout + run.stderr


def test_only_requests_at_their_end_are_sampled(llama: Subject) -> None:
    driver = Driver(llama.engine())
    first, second = make_request(make_prompt(40)), make_request(make_prompt(5))
    driver.step([(first, 30)])
    assert driver.sampled == {}
    driver.step([(first, 9), (second, 5)])
    assert list(driver.sampled) == [second.request_id]
    driver.step([(first, 1), (second, 1)])
    assert len(driver.sampled[first.request_id]) == 1
    assert len(driver.sampled[second.request_id]) == 2


def test_requests_are_only_read(llama: Subject) -> None:
    engine = llama.engine()
    request = make_request(make_prompt(5))
    request.block_table = [3]
    engine.step([ScheduledRequest(request, 5)])
    assert request.token_ids == list(make_prompt(5))
    assert (request.block_table, request.num_computed_tokens) == ([3], 0)


def test_logits_are_those_of_transformers(llama: Subject) -> None:
    """Every family's tokens are compared elsewhere; here the numbers behind them."""
    prompt = make_prompt(130)
    driver = Driver(llama.engine())
    request = make_request(prompt, max_tokens=1, num_logprobs=331)
    driver.run([request])
    logprobs = driver.sampled[request.request_id][0].logprobs
    assert logprobs is not None
    ours = torch.tensor([value for _, value in sorted(logprobs.top)])
    with torch.no_grad():
        theirs = llama.reference(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt-post-norm", "gpt2"])
def test_trimming_the_last_layer_changes_no_token(family: str, get_subject: Callable[[str], Subject]) -> None:
    subject = get_subject(family)
    outputs = []
    for trim in (True, False):
        driver = Driver(Engine(subject.loaded, num_blocks=100, trim_last_layer=trim))
        requests = [make_request(make_prompt(length), max_tokens=24) for length in (1, 17, 33)]
        driver.run(requests, chunk_size=10)
        outputs.append([driver.output(request) for request in requests])
    assert outputs[0] == outputs[1] == [expected_tokens(subject, make_prompt(length)) for length in (1, 17, 33)]


def test_warming_up_leaves_nothing_behind(llama: Subject) -> None:
    engine = llama.engine()
    engine.warm_up()
    driver = Driver(engine)
    request = make_request(make_prompt(17))
    driver.run([request])
    assert driver.output(request) == expected_tokens(llama, make_prompt(17))


def test_every_layer_of_a_step_is_a_sign_of_life(get_subject: Callable[[str], Subject]) -> None:
    for family in FAMILIES:
        engine = get_subject(family).engine()
        layers: list[int] = []
        engine.progress.on_layer = layers.append
        before = engine.progress.num_signs
        Driver(engine).run([make_request(make_prompt(17), max_tokens=2)])
        num_layers = engine.shape.num_layers
        assert layers == [*range(num_layers)] * 2, family
        assert engine.progress.num_signs == before + 2 * num_layers


def test_logprobs_of_a_long_prompt_are_signs_of_life(llama: Subject) -> None:
    engine = llama.engine()
    Driver(engine).run([make_request(make_prompt(130), max_tokens=1, num_prompt_logprobs=0)])
    assert engine.progress.num_signs == engine.shape.num_layers + 3


def test_stale_blocks_have_no_influence(llama: Subject) -> None:
    """Blocks come back from the pool with anything in them, not-a-number included."""
    engine = llama.engine()
    engine.kv_cache.fill_(float("nan"))
    driver = Driver(engine)
    requests = [make_request(make_prompt(length)) for length in (1, 17, 130)]
    driver.run(requests, chunk_size=20)
    for request, length in zip(requests, (1, 17, 130), strict=True):
        assert driver.output(request) == expected_tokens(llama, make_prompt(length))


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_formats(family: str, dtype: str, get_subject: Callable[[str], Subject]) -> None:
    """Prefilled, chunked and decoded logprobs stay near float32's: within what 8 or 11 bits of mantissa leave."""
    subject = get_subject(family)
    engine = Engine(load_model(subject.path, dtype=dtype, device="cpu"), num_blocks=50)
    assert engine.kv_cache.dtype is getattr(torch, dtype)
    prompt = make_prompt(40)
    driver = Driver(engine)
    request = make_request(prompt, max_tokens=6, num_logprobs=0, num_prompt_logprobs=0)
    driver.run([request], chunk_size=25)
    with torch.no_grad():
        theirs = subject.reference(torch.tensor([request.token_ids])).logits[0].log_softmax(-1)
    entries = driver.prompt_logprobs[request.request_id][1:]
    ours = [entry.logprob for entry in entries if entry is not None]
    ours += [token.logprobs.logprob for token in driver.sampled[request.request_id] if token.logprobs is not None]
    assert len(ours) == 45
    expected = theirs[torch.arange(45), torch.tensor(request.token_ids[1:])]
    error = (torch.tensor(ours) - expected).abs().mean().item()
    assert error < {"bfloat16": 0.25, "float16": 0.03}[dtype]
