"""The Dockerfile agrees with the repository: versions, copied paths, commands. It is not built here."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "launch" / "docker" / "Dockerfile"
KNOWN = {"ARG", "FROM", "COPY", "RUN", "ENV", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) in order; continued lines are joined, comments are left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(first, rest.strip()) for first, _, rest in (line.partition(" ") for line in joined.split("\n")) if first]


FOUND = instructions(DOCKERFILE.read_text())


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in FOUND if instruction == name]


def arg(name: str) -> str:
    (value,) = [rest.split("=", 1)[1] for rest in arguments("ARG") if rest.startswith(f"{name}=")]
    return value


def locked(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_instructions_are_known_and_in_a_possible_order() -> None:
    names = [name for name, _ in FOUND]
    assert set(names) <= KNOWN and names[:2] == ["ARG", "FROM"] and names.count("FROM") == 1
    assert arguments("USER") and names.index("USER") > len(names) - 1 - names[::-1].index("RUN"), "not root at the end"


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["requires-python"].removeprefix(">=")
    assert arg("PYTHON") == wanted == project["tool"]["mypy"]["python_version"]
    assert f"--python-version {wanted} " in (ROOT / "Makefile").read_text(), "requirements.lock is for this Python"
    cuda = arg("CUDA").split(".")
    assert cuda[:2] == locked("nvidia-cuda-runtime").split(".")[:2], "the CUDA that the locked PyTorch was built for"
    assert arguments("FROM") == ["nvidia/cuda:${CUDA}-devel-ubuntu24.04"]


def test_everything_that_is_copied_is_there_and_not_ignored() -> None:
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    left_out = [line for line in lines if line and line[0] not in "!#" and line != "*"]
    copied = [rest.split()[:-1] for rest in arguments("COPY") if not rest.startswith("--from")]
    sources = [source for sources in copied for source in sources]
    assert sorted(sources) == sorted(kept), "the context holds what is copied, and nothing else"
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch.fnmatch(source, pattern) for pattern in left_out)


def test_what_the_package_needs_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {*project["tool"]["setuptools"]["package-dir"].values(), project["project"]["readme"], "pyproject.toml",
              *project["project"]["license-files"], "requirements.lock"}  # fmt: skip
    copied = {source for rest in arguments("COPY") for source in rest.split()[:-1]}
    assert needed <= copied
    for start in [json.loads(rest) for rest in arguments("ENTRYPOINT")]:
        assert start[0] in project["project"]["scripts"]


@pytest.mark.parametrize("command", arguments("RUN"))
def test_commands_are_shell(command: str) -> None:
    plain = re.sub(r"^--mount=\S+ ", "", command)
    done = subprocess.run(["bash", "-n", "-c", plain], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
