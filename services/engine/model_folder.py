"""From what a user typed (a folder, or a name on the Hugging Face hub) to a folder whose files may be read."""

from __future__ import annotations

import re
from pathlib import Path

from baton.services.core.errors import ConfigurationError
from baton.services.engine.config_file import read_json_object

# Text formats and safetensors; no pickles, no code. Some repositories hold the same weights a second time.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
HUB_IGNORED_PATTERNS = ("consolidated*", "original/*", "onnx/*")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def resolve_model_folder(path_or_id: str) -> Path:
    """The local folder of a model, downloading it if it is a hub id. Raises ConfigurationError."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        folder = path.resolve()
        _check_links(folder)
        return folder
    if path.exists():
        raise ConfigurationError(f"{path_or_id}: expected a model folder, found a file")
    if _HUB_ID.fullmatch(path_or_id) is None:
        raise ConfigurationError(f"{path_or_id}: no such folder")
    return _download(path_or_id)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Refuse a folder without a tokenizer, or with one whose tokens the model has no embeddings for."""
    if not any(all((folder / name).exists() for name in names) for names in _TOKENIZER_FILES):
        raise ConfigurationError(
            f"{folder}: no tokenizer: expected {' or '.join(' with '.join(names) for names in _TOKENIZER_FILES)}"
        )
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    largest = max(_tokenizer_ids(read_json_object(path)), default=-1)
    if largest >= vocab_size:
        raise ConfigurationError(
            f"{path}: token id {largest}: expected less than vocab_size {vocab_size} of config.json: "
            "the tokenizer belongs to another model"
        )


def _tokenizer_ids(tokenizer: dict[str, object]) -> list[int]:
    ids: list[int] = []
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):  # BPE and WordPiece: token -> id
        ids += [value for value in vocab.values() if isinstance(value, int)]
    elif isinstance(vocab, list):  # Unigram: the index is the id
        ids.append(len(vocab) - 1)
    added = tokenizer.get("added_tokens")
    if isinstance(added, list):
        ids += [token["id"] for token in added if isinstance(token, dict) and isinstance(token.get("id"), int)]
    return ids


def _check_links(folder: Path) -> None:
    """Links must stay inside the folder: a model from somebody else must not reach into the rest of the disk.

    In the hub's own cache, snapshots/<revision>/ holds links to ../../blobs/; those are allowed.
    """
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    for path in folder.iterdir():
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in allowed):
            raise ConfigurationError(f"{path}: a link to {target}, outside of the model folder; copy the file instead")


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(repo_id, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED_PATTERNS))
        )
    except GatedRepoError:
        raise ConfigurationError(
            f"{repo_id}: access to this model must be requested on the hub (set HF_TOKEN)"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ConfigurationError(f"{repo_id}: neither a folder here nor a model on the Hugging Face hub") from None
    except LocalEntryNotFoundError:
        raise ConfigurationError(
            f"{repo_id}: no such folder, and the Hugging Face hub cannot be reached: check the name or the network, "
            "or download the model and pass its folder"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ConfigurationError(f"{repo_id}: the download failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
