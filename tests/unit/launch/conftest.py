"""The demo's modules lie beside its script, as they do when the script runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
sys.path.insert(0, str(LAUNCH / "demo"))


@pytest.fixture(scope="session")
def tiny_demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the tiny demo trains."""
    import tiny

    text = "[INST] Is there an animal in the list?\n\ncat stone [/INST] yes"
    return tiny.make_model(tmp_path_factory.mktemp("demo") / "tiny-llama", text)
