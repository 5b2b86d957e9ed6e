"""requirements.lock holds a version with hashes for every dependency, inside the ranges of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]


def test_the_lock_fits_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(item for name in ("test", "demo", "dev", "liger", "tasks") for item in extras[name]),
    ]
    text = (ROOT / "requirements.lock").read_text()
    locked = {name.lower(): version for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", text, re.MULTILINE)}
    for item in map(Requirement, wanted):
        if item.name == "salient-ds":
            continue
        assert item.specifier.contains(locked[item.name.lower()], prereleases=True), item
    pins = text.split("\n")
    for number, line in enumerate(pins):
        if "==" in line and not line.startswith(("#", " ")):
            assert "--hash=sha256:" in pins[number + 1], line
