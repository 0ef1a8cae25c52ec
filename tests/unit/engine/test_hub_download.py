"""What is asked of the hub: text and safetensors, never pickles or code; and its failures in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from baton.services.core.errors import ConfigurationError
from baton.services.engine.model_folder import resolve_model_folder


def test_only_harmless_files_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model_folder("some-org/some-model") == tmp_path
    files = [
        "config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "merges.txt",
        "pytorch_model.bin", "modeling_evil.py", "model.pt", "consolidated.safetensors", "original/params.json",
    ]  # fmt: skip
    wanted = list(
        filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    )
    assert asked["repo_id"] == "some-org/some-model"
    assert wanted == files[:5]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RepositoryNotFoundError, "neither a folder here nor a model on the Hugging Face hub"),
        (GatedRepoError, "access to this model must be requested"),
        (HfHubHTTPError, "the download failed: the hub said no"),
    ],
)
def test_failures(monkeypatch: pytest.MonkeyPatch, error: type[HfHubHTTPError], words: str) -> None:
    def download(*_: Any, **__: Any) -> str:
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub.example"))
        raise error("the hub said no\nand much more", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ConfigurationError, match=words) as caught:
        resolve_model_folder("some-org/some-model")
    assert "\n" not in caught.value.message
