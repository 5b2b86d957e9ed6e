"""Makes ``python eval/bench/NAME.py`` work in a checkout that is not installed.

The scripts in this folder import this module only when they are run by path. It puts the repository first on the module
search path, in place of this folder, whose module names would shadow others. And it maps the folder ``eval`` to the
package ``salient_eval``, as pyproject.toml does for an installation.
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
