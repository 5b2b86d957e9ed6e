"""Makes ``python eval/bench/NAME.py`` work in a checkout that is not installed: imported by the scripts here only then.

Puts the repository in front of the module search path (in place of this folder, whose names would shadow others) and
maps its ``eval`` folder to the package ``salient_eval``, as pyproject.toml does on installation.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

PACKAGE = "salient_eval.bench"

_root = Path(__file__).resolve().parents[2]
sys.path[0] = str(_root)
_package = types.ModuleType("salient_eval")
_package.__path__ = [str(_root / "eval")]
sys.modules["salient_eval"] = _package
