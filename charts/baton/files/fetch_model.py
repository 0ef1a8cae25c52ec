"""Downloads a model from the Hugging Face hub into a folder; run as an init container, and harmless to run again.

Pods may share the folder: one downloads, the others wait for its lock. A finished download is verified against the hub's
checksums and leaves a list of its files and sizes, with which later starts need no network.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

# No code and no pickles: only what Baton reads.
_TEXT = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_PATTERNS = {"all": [*_TEXT, "*.safetensors"], "tokenizer": _TEXT}
# Second copies of the weights in other layouts.
_IGNORED = ["original/*", "consolidated*", "onnx/*"]
_CHUNK_BYTES = 1 << 20


def fetch(repository: str, revision: str, directory: Path, files: str) -> str:
    """Makes ``directory`` hold the model, and returns what was done. ``files``: a key of _PATTERNS."""
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f"{directory.name}.lock")):
        if any(_is_complete(directory, done) for done in ("all", files)):
            return "already complete"
        snapshot_download(
            repository,
            revision=revision,
            local_dir=directory,
            allow_patterns=_PATTERNS[files],
            ignore_patterns=_IGNORED,
        )
        verified = _verify(repository, revision, directory)
        _mark_complete(directory, files)
    return f"downloaded, {verified} files verified"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _files(directory: Path) -> dict[str, int]:
    """Size of every visible file, by its path in ``directory``."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    relative = ((path.relative_to(directory), path) for path in paths)
    return {str(name): path.stat().st_size for name, path in relative if not name.parts[0].startswith(".")}


def _marker(directory: Path, files: str) -> Path:
    return directory / f".complete-{files}.json"


def _mark_complete(directory: Path, files: str) -> None:
    marker = _marker(directory, files)
    unfinished = marker.with_suffix(".tmp")
    unfinished.write_text(json.dumps(_files(directory)), encoding="utf-8")
    unfinished.replace(marker)


def _is_complete(directory: Path, files: str) -> bool:
    marker = _marker(directory, files)
    if not marker.exists():
        return False
    present = _files(directory)
    return all(present.get(name) == size for name, size in json.loads(marker.read_text(encoding="utf-8")).items())


def _verify(repository: str, revision: str, directory: Path) -> int:
    """Compares the large files with the checksums that the hub has for them; a wrong one is deleted."""
    verified = 0
    for sibling in HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or []:
        path = directory / sibling.rfilename
        if sibling.lfs is None or not path.exists():
            continue
        digest = hashlib.sha256()
        with path.open("rb") as content:
            while chunk := content.read(_CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != sibling.lfs.sha256:
            path.unlink()
            raise ValueError(f"{path.name}: expected SHA-256 {sibling.lfs.sha256}, found {digest.hexdigest()}; deleted")
        verified += 1
    return verified


def main() -> int:
    """Reads MODEL_REPOSITORY, MODEL_REVISION, MODEL_DIRECTORY and MODEL_FILES; returns the exit status."""
    repository, revision = os.environ["MODEL_REPOSITORY"], os.environ["MODEL_REVISION"]
    directory = Path(os.environ["MODEL_DIRECTORY"])
    try:
        done = fetch(repository, revision, directory, os.environ["MODEL_FILES"])
    except (OSError, ValueError) as error:
        print(f"{repository}@{revision}: {error}", file=sys.stderr)
        return 1
    print(f"{repository}@{revision} in {directory}: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
