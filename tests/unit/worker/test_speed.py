"""What a step should take: unknown, then as the warm-up measured it, then as steps went."""

from __future__ import annotations

import pytest
from helpers.tiny_models import make_model_dir

from baton.services.engine.engine import Engine
from baton.services.engine.loader import LoadedModel, load_model
from baton.services.worker.speed import Speed, warm_up


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    make_model_dir("llama", folder)
    return load_model(folder, dtype="float32", device="cpu")


def test_nothing_is_known_at_first() -> None:
    speed = Speed()
    assert speed.expected_step_s(0, 0) == 0.0
    assert speed.expected_step_s(100, 0) is None
    assert speed.expected_step_s(0, 1) is None


def test_a_step_grows_with_its_tokens() -> None:
    speed = Speed(warm_step_s=0.01, warm_s_per_token=0.001)
    assert speed.expected_step_s(2, 0) == pytest.approx(0.01)  # any step takes so long
    assert speed.expected_step_s(100, 0) == pytest.approx(0.1)
    assert speed.expected_step_s(0, 1) == pytest.approx(0.011)
    assert speed.expected_step_s(100, 64) == pytest.approx(0.1 + 0.01 + 0.064)


def test_what_steps_took_lately_replaces_what_the_warm_up_took() -> None:
    speed = Speed(warm_step_s=0.01, warm_s_per_token=0.001)
    speed.observe(0.5, 1000, 1, 0)
    speed.observe(0.02, 0, 4, 4)
    assert speed.expected_step_s(100, 0) == pytest.approx(0.05)
    assert speed.expected_step_s(100, 1) == pytest.approx(0.05 + 0.02 + 0.0005)


def test_the_share_of_prompts_is_of_steps_in_which_streams_get_tokens() -> None:
    speed = Speed(warm_step_s=0.01, warm_s_per_token=0.001)
    assert speed.prompt_share == 0.0
    for _ in range(1000):
        speed.observe(0.02, 0, 4, 4)
        speed.observe(0.08, 60, 4, 4)
        speed.observe(0.5, 500, 1, 0)  # nobody waits for a token
    assert speed.prompt_share == pytest.approx(0.06 / 0.1, rel=0.05)
    for _ in range(1000):
        speed.observe(0.02, 0, 4, 4)
    assert speed.prompt_share == pytest.approx(0.0, abs=0.01)


def test_where_kernels_are_compiled_a_size_is_known_once_it_was_computed() -> None:
    speed = Speed(warm_step_s=0.01, warm_s_per_token=0.001, compiles=True)
    assert speed.expected_step_s(100, 3) is None
    speed.observe(0.5, 100, 3, 3)
    assert speed.expected_step_s(120, 2) is not None  # the same powers of two
    assert speed.expected_step_s(130, 2) is None
    assert speed.expected_step_s(120, 4) is None


def test_warming_up_leaves_no_step_unknown_and_stays_within_the_cache(loaded: LoadedModel) -> None:
    engine = Engine(loaded, num_blocks=13, block_size=16)
    speed = warm_up(engine, 13 * 16 - 1)
    for num_prompt_tokens, num_generating in ((1, 0), (2048, 0), (0, 1), (0, 64), (2048, 64)):
        expected_s = speed.expected_step_s(num_prompt_tokens, num_generating)
        assert expected_s is not None
        assert expected_s > 0.0


def test_a_longer_prompt_tells_what_a_token_costs(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    """Tokens of a prompt cost less each than a step does: a long first prompt is not given minutes."""
    engine, now_s = Engine(loaded, num_blocks=13, block_size=16), 0.0

    def step(num_tokens: int) -> None:
        nonlocal now_s
        now_s += 0.01 + num_tokens * 0.0001

    monkeypatch.setattr(engine, "warm_up", step)
    speed = warm_up(engine, 13 * 16 - 1, clock=lambda: now_s)
    assert speed.warm_step_s == pytest.approx(0.0102)
    assert 0.0001 < speed.warm_s_per_token < 0.0002


def test_a_cache_of_one_small_block_is_enough_to_warm_up(loaded: LoadedModel) -> None:
    speed = warm_up(Engine(loaded, num_blocks=1, block_size=4), 3)
    assert speed.warm_step_s > 0.0
