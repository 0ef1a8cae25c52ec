"""Names, defaults and end-of-sequence ids of the served model."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.gateway_api import chat_body, make_gateway

from baton.services.core.errors import BatonError, ConfigurationError
from baton.services.gateway.served_model import GenerationDefaults, ServedModel, read_generation_config


def write(folder: Path, generation: str | None, config: str = '{"eos_token_id": 9}') -> Path:
    (folder / "config.json").write_text(config)
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    return folder


def test_generation_config_gives_defaults_and_ends(tmp_path: Path) -> None:
    text = '{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2], "do_sample": true, "min_p": null}'
    defaults, ends = read_generation_config(write(tmp_path, text))
    assert defaults == GenerationDefaults(temperature=0.6, top_k=20, top_p=0.95)
    assert ends == {1, 2}


@pytest.mark.parametrize(
    ("config", "ends"), [('{"eos_token_id": 9}', {9}), ('{"eos_token_id": null}', set()), ("{}", set())]
)
def test_without_it_the_model_config_names_the_end(tmp_path: Path, config: str, ends: set[int]) -> None:
    assert read_generation_config(write(tmp_path, None, config)) == (GenerationDefaults(), frozenset(ends))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"temperature": "hot"}', '{"eos_token_id": "x"}', '{"eos_token_id": [1, -2]}', '{"top_k": true}'],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError):
        read_generation_config(write(tmp_path, text))


@pytest.mark.parametrize("top_k", [-1, 0])
def test_top_k_below_one_is_off(top_k: int) -> None:
    assert GenerationDefaults.from_generation_config({"top_k": top_k}).top_k == 0


def test_names_are_resolved_exactly() -> None:
    model = ServedModel("a/b", 10, 10, aliases=("c",))
    assert [model.resolve(name) for name in (None, "a/b", "c")] == ["a/b", "a/b", "c"]
    for name in ("A/B", "a/b ", ""):
        with pytest.raises(BatonError):
            model.resolve(name)


async def test_defaults_apply_where_the_request_is_silent() -> None:
    gateway = make_gateway()
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)
    model = gateway.deps.model
    gateway.deps.model = ServedModel(model.name, model.max_model_len, model.vocab_size, defaults=defaults)
    async with gateway.client() as client:
        await client.post("/v1/chat/completions", json=chat_body())
        await client.post("/v1/chat/completions", json=chat_body(temperature=0.001, top_p=1, top_k=-1, min_p=0))
        await client.post(
            "/v1/chat/completions", json=chat_body(temperature=0, top_k=10**9, logit_bias={"5": 500, "4": -1})
        )
    silent, explicit, greedy = (request.sampling for request in gateway.dispatcher.requests)
    assert (silent.temperature, silent.top_p, silent.top_k, silent.min_p, silent.repetition_penalty) == (
        0.6,
        0.9,
        20,
        0.1,
        1.1,
    )
    assert (explicit.temperature, explicit.top_p, explicit.top_k, explicit.min_p) == (0.01, 1.0, 0, 0.0)
    assert greedy.is_greedy
    assert greedy.top_k == model.vocab_size
    assert greedy.logit_bias == ((4, -1.0), (5, 100.0))
