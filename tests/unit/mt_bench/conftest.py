"""Fixtures: the package by path when it is not installed, golden numbers, and a scripted judge."""

from __future__ import annotations

import importlib.util
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

from mt_bench_goldens import Golden, own_golden, shared_folder, shared_golden, write_stand_in  # noqa: E402
from salient_eval.mt_bench import questions  # noqa: E402
from scripted_judge import ScriptedJudge  # noqa: E402

OWN_AND_SHARED = ["own", pytest.param("shared", marks=pytest.mark.outside)]
"""Our own files everywhere; MT-Bench's with ``-m outside``, from the folder that SALIENT_SHARED names."""


@pytest.fixture(scope="session", params=OWN_AND_SHARED)
def golden(request: pytest.FixtureRequest) -> Golden:
    """FastChat's recorded numbers."""
    return own_golden() if request.param == "own" else shared_golden()


@pytest.fixture(params=OWN_AND_SHARED)
def mt_bench_data(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """MT-Bench's files, or a set of ours with their names and shape, whose hashes stand in for the pinned ones."""
    if request.param == "shared":
        return shared_folder("mt_bench")
    folder = tmp_path_factory.mktemp("stand_in")
    monkeypatch.setattr(questions, "MT_BENCH_SHA256", write_stand_in(folder))
    return folder


@pytest.fixture
def judge_server() -> Iterator[ScriptedJudge]:
    with ScriptedJudge() as server:
        yield server


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
