"""The small model that comes with Baton: it looks up facts in its prompt, so that a wrong KV cache gives a wrong answer."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def demo_model_path() -> Path:
    """The Hugging Face model folder: this package's own."""
    return Path(str(files(__package__)))
