"""Fixtures: the package by path when it is not installed, the golden folder, and a scripted judge."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
if importlib.util.find_spec("salient_eval") is None:
    package = types.ModuleType("salient_eval")
    package.__path__ = [str(REPO / "eval")]
    sys.modules["salient_eval"] = package
sys.path.insert(0, str(Path(__file__).parent))

from scripted_judge import ScriptedJudge  # noqa: E402


def shared_folder(name: str) -> Path:
    """A folder beside the repository that is never part of it; skips when it is not there."""
    root = Path(os.environ.get("SALIENT_SHARED") or REPO.parent / "shared")
    folder = root / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not here; set SALIENT_SHARED to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """FastChat's recorded numbers (the README in that folder says which function gave which file)."""
    return shared_folder("golden/mtbench")


@pytest.fixture(scope="session")
def mt_bench_data() -> Path:
    """The real MT-Bench files."""
    return shared_folder("mt_bench")


@pytest.fixture
def judge_server() -> Iterator[ScriptedJudge]:
    with ScriptedJudge() as server:
        yield server


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
