"""The architectures that this program can run. One file per family: write it, add its line here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from baton.services.core.errors import ConfigurationError
from baton.services.engine.config import CONFIG_NAME, ModelConfig, read_architecture, read_generation_defaults
from baton.services.engine.config_file import ConfigFile
from baton.services.engine.models import gpt2, llama, mistral, opt, qwen2, qwen3
from baton.services.engine.models.base import ModelFamily

FAMILIES: Mapping[str, ModelFamily] = MappingProxyType(
    {
        family.architecture: family
        for family in (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY, mistral.FAMILY, opt.FAMILY, gpt2.FAMILY)
    }
)


def read_model_config(folder: Path) -> tuple[ModelFamily, ModelConfig]:
    """What is in a model folder. Raises ConfigurationError naming file, field and value."""
    raw = ConfigFile.read(folder / CONFIG_NAME)
    architecture = read_architecture(raw)
    family = FAMILIES.get(architecture)
    if family is None:
        raise ConfigurationError(
            f"{folder / CONFIG_NAME}: architecture {architecture!r} is not supported; supported are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return family, family.read_config(raw, read_generation_defaults(folder))
