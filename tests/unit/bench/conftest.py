"""The package by path when it is not installed, and arms small enough for a test."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
if importlib.util.find_spec("salient_eval") is None:
    package = types.ModuleType("salient_eval")
    package.__path__ = [str(REPO / "eval")]
    sys.modules["salient_eval"] = package
