"""Which part of the package may import what, proved on the source and in fresh interpreters.

- the maths (ranks, steps, adapters, salience, methods, export/fold.py) knows neither DeepSpeed nor process groups;
- only zero/ imports deepspeed;
- what ``salient-ds check`` and the launcher's pre-flight need imports no torch;
- package ``__init__`` files import nothing, so that importing one module does not pull in its neighbours.

Each check is a function of a source tree, so that the last tests can show it fail on a planted violation.
"""

from __future__ import annotations

import ast
import functools
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PURE = ("ranks.py", "steps.py", "adapters", "salience", "methods", "export/fold.py")
LIGHT = (
    "strict",
    "ranks",
    "steps",
    "adapters.forms",
    "adapters.options",
    "adapters.targets",
    "methods.duties",
    "methods.options",
    "methods.base",
    "methods.salientlora.options",
    "methods.adalora.options",
    "methods.lora2.options",
    "methods.increlora.options",
    "methods.lora.options",
    "heterolora.options",
    "methods.table",
    "config.run",
    "config.speed",
    "salience.budget",
    "salience.cubic_budget",
    "salience.spectral_cut",
    "zero.ds_json",
    "data.formats",
    "data.templates",
    "data.sources",
    "data.tasks.table",
    "data.tasks.reading",
    "data.tasks.rouge",
    "recipes.book",
    "recipes.commands",
    "models.kernels",
    "monitor.directory",
    "check.preflight",
    "check.printing",
    "run.search",
    "sweep.command",
    "sweep.report",
    "sweep.page",
    "sweep.worker",
    "run.shrink",
    "train",
    "search",
    "cli",
)
HEAVY = ("torch", "deepspeed", "transformers")


@functools.cache
def imported_names(text: str) -> tuple[tuple[int, str], ...]:
    """(line, dotted name) of everything a file imports, wherever in it, ``importlib`` with a literal included."""
    return tuple(_each_name(ast.parse(text)))


def _each_name(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function in ("importlib.import_module", "import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(package: Path, files: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(package)}:{line} imports {name}"
        for path in files
        for line, name in imported_names(path.read_text())
        if any(is_inside(name, other) for other in forbidden)
    ]


def pure_violations(package: Path) -> list[str]:
    files = [
        f
        for part in PURE
        for f in ([package / part] if part.endswith(".py") else sorted((package / part).rglob("*.py")))
    ]
    forbidden = (
        "deepspeed",
        "torch.distributed",
        "salient_ds.zero",
        "salient_ds.engine",
        "salient_ds.run",
        "salient_ds.train",
    )
    return violations(package, files, forbidden)


def deepspeed_outside_zero(package: Path) -> list[str]:
    files = [f for f in sorted(package.rglob("*.py")) if f.relative_to(package).parts[0] != "zero"]
    return violations(package, files, ("deepspeed",))


def full_init_files(package: Path) -> list[str]:
    """``__init__`` files with more than a docstring, dunder constants and a lazy ``__getattr__`` for old paths."""
    found = []
    for path in sorted(package.rglob("__init__.py")):
        for node in ast.parse(path.read_text()).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_constant = isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            is_old_path = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
            if not (is_docstring or is_constant or is_old_path):
                found.append(f"{path.relative_to(package)}:{node.lineno}")
    return found


def heavy_after_import(parent: Path, modules: tuple[str, ...], heavy: tuple[str, ...]) -> list[str]:
    """Import the modules one after the other in a fresh interpreter; name the first that loads something heavy."""
    program = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(parent)!r})\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module('salient_ds.' + name)\n"
        f"    loaded = [other for other in {heavy!r} if other in sys.modules]\n"
        "    if loaded:\n"
        "        sys.exit(f'salient_ds.{name} loads {loaded}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=parent, timeout=300)
    return [] if done.returncode == 0 else [done.stderr.strip().splitlines()[-1]]


def dotted(package: Path, part: str) -> list[str]:
    files = [package / part] if part.endswith(".py") else sorted((package / part).rglob("*.py"))
    return [".".join(f.relative_to(package).with_suffix("").parts).removesuffix(".__init__") for f in files]


PACKAGE = ROOT / "salient_ds"


def test_the_maths_knows_no_process_group() -> None:
    assert pure_violations(PACKAGE) == []


def test_only_zero_imports_deepspeed() -> None:
    assert deepspeed_outside_zero(PACKAGE) == []


def test_every_folder_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(f.parent.relative_to(ROOT).parts) for f in PACKAGE.rglob("__init__.py")}
    assert folders == {name for name in listed if name.startswith("salient_ds")}
    assert all((folder / "__init__.py").exists() for folder in {f.parent for f in PACKAGE.rglob("*.py")})


def test_init_files_are_empty() -> None:
    assert full_init_files(PACKAGE) == []


def test_light_modules_load_nothing_heavy() -> None:
    assert heavy_after_import(ROOT, LIGHT, HEAVY) == []


def test_importing_the_maths_does_not_load_deepspeed() -> None:
    modules = tuple(name for part in PURE for name in dotted(PACKAGE, part))
    assert heavy_after_import(ROOT, modules, ("deepspeed",)) == []


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A copy of the package to spoil."""
    shutil.copytree(PACKAGE, tmp_path / "salient_ds", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "salient_ds"


@pytest.mark.parametrize(
    "line",
    [
        "import deepspeed",
        "from deepspeed.utils import groups",
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "def late():\n    import deepspeed.comm",
        "import importlib\ndef late():\n    return importlib.import_module('deepspeed')",
        "import torch\nworld = torch.distributed.get_world_size",
        "from salient_ds.engine.engine import AllocatingEngine",
    ],
)
@pytest.mark.parametrize("place", ["salience/extra.py", "methods/extra.py", "adapters/extra.py", "export/fold.py"])
def test_a_planted_import_in_the_maths_is_found(planted: Path, place: str, line: str) -> None:
    assert pure_violations(planted) == []
    (planted / place).write_text(line + "\n")
    (found,) = pure_violations(planted)
    assert found.startswith(place)


def test_planted_deepspeed_outside_zero_is_found(planted: Path) -> None:
    (planted / "monitor" / "extra.py").write_text("def f():\n    import deepspeed\n")
    assert deepspeed_outside_zero(planted) == ["monitor/extra.py:2 imports deepspeed"]
    (planted / "zero" / "extra.py").write_text("import deepspeed\n")
    assert len(deepspeed_outside_zero(planted)) == 1


def test_a_planted_import_in_an_init_file_is_found(planted: Path) -> None:
    (planted / "data" / "__init__.py").write_text('"""Data."""\n\nfrom salient_ds.data import collate\n')
    assert full_init_files(planted) == ["data/__init__.py:3"]


def test_planted_torch_in_a_light_module_is_found(planted: Path) -> None:
    light = ("strict", "methods.options", "methods.lora2.options")
    assert heavy_after_import(planted.parent, light, HEAVY) == []
    (planted.parent / "torch.py").write_text("")  # a stand-in, found before the real one
    source = planted / "methods" / "lora2" / "options.py"
    source.write_text(source.read_text().replace("from typing import", "import torch\nfrom typing import", 1))
    (found,) = heavy_after_import(planted.parent, light, HEAVY)
    assert found == "salient_ds.methods.lora2.options loads ['torch']"


def test_old_import_paths_still_work() -> None:
    program = (
        "from salient_ds.config import ConfigError, RunConfig, load_config, parse_config\n"
        "from salient_ds.models import load_model, load_tokenizer\n"
        "from salient_ds.training import Training\n"
        "from salient_ds.inputs import load_inputs, micro_batches\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
