"""What the recipe of the images says."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "services" / "Dockerfile"
INSTALL = ROOT / "services" / "install.sh"
TARGETS = {"gateway": "gateway", "worker-cpu": "decode", "worker-cuda": "decode"}


@dataclass
class Stage:
    """A stage of the Dockerfile: what it starts from, and its instructions in order."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [text for name, text in self.instructions if name == keyword]

    def last(self, keyword: str) -> str:
        return self.all(keyword)[-1]


def _stages() -> dict[str, Stage]:
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    stages: dict[str, Stage] = {}
    stage = Stage("", "")
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            stage = stages[name] = Stage(name, base)
        else:
            stage.instructions.append((keyword, rest.strip()))
    return stages


def _copied(stages: dict[str, Stage]) -> list[str]:
    """What the images take from the repository."""
    texts = [shlex.split(text) for stage in stages.values() for text in stage.all("COPY")]
    return [source for words in texts if not words[0].startswith("--from") for source in words[:-1]]


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_a_numeric_user_that_is_not_root(target: str) -> None:
    stage = _stages()[target]
    assert stage.last("USER") == "10001:10001"
    # What comes after changes nothing in the file system.
    assert {name for name, _ in stage.instructions[stage.instructions.index(("USER", "10001:10001")) + 1 :]} == {
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }


@pytest.mark.parametrize(("target", "role"), TARGETS.items())
def test_images_start_their_role_and_check_it(target: str, role: str) -> None:
    stage = _stages()[target]
    assert stage.last("ENTRYPOINT") == '["baton"]'
    assert stage.last("CMD") == f'["{role}"]'
    kind = "http" if target == "gateway" else "grpc"
    assert f'CMD ["python", "-m", "baton.services.healthcheck", "{kind}"]' in stage.last("HEALTHCHECK")
    assert f"BATON_PORT={8000 if target == 'gateway' else 9000}" in stage.all("ENV")[0]


@pytest.mark.parametrize("target", TARGETS)
def test_images_are_installed_by_the_tested_steps_and_keep_nothing_else(target: str) -> None:
    stages = _stages()
    assert stages[target].base == "base"
    assert stages[target].all("COPY") == [f"--from=build-{target} /opt/baton /opt/baton"]
    (run,) = stages[f"build-{target}"].all("RUN")
    assert run.endswith(f"services/install.sh {target} /opt/baton")


def test_only_the_image_that_compiles_kernels_has_a_compiler() -> None:
    stages = _stages()
    packages = {
        name: stage.all("RUN") for name, stage in stages.items() if any("apt-get" in r for r in stage.all("RUN"))
    }
    assert list(packages) == ["worker-cuda"]
    assert re.findall(r"--no-install-recommends (.*?) +&&", packages["worker-cuda"][0]) == ["gcc libc6-dev"]


def test_no_registry_is_named() -> None:
    for path in (DOCKERFILE, INSTALL):
        code = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
        assert not [line for line in code if "://" in line or re.search(r"\b[\w-]+\.(org|io|com)\b", line)]


def test_everything_that_is_copied_exists_and_reaches_the_builder() -> None:
    patterns = [
        line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
    ]
    copied = _copied(_stages())
    for source in copied:
        assert (ROOT / source).exists()
        ignored = False
        for pattern in patterns:  # the last that matches decides
            if fnmatch(source, pattern.removeprefix("!")):
                ignored = not pattern.startswith("!")
        assert not ignored, source
    # The steps copy the same once more, for a clean build.
    (listed,) = re.findall(r"^for PART in (.*); do$", INSTALL.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed.split()) == sorted(copied)


def test_torch_is_pinned_as_in_the_makefile() -> None:
    (pin,) = re.findall(r"^TORCH_PIN := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert f"TORCH=${{TORCH:-{pin}}}" in INSTALL.read_text(encoding="utf-8")


def test_an_unknown_role_is_refused(tmp_path: Path) -> None:
    result = subprocess.run([INSTALL, "planner", tmp_path / "venv"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "unknown role planner" in result.stderr
    assert not (tmp_path / "venv").exists()
