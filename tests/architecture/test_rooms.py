"""Rooms: no circles, the import table of DESIGN.md is what the code does, nobody but the table knows a method's name.

Each check is a function of a source tree, so that the last tests can show it fail on a planted violation.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
from pathlib import Path

import pytest

from salient_ds.methods.table import BUILT_IN
from salient_ds.zero.internals.contract import PRIVATE_ELSEWHERE
from tests.architecture.import_graph import circles, module_graph, room_graph

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "salient_ds"
EVALUATION = ROOT / "eval"
METHOD_ROOMS = ("methods", "heterolora")
"""Where the classes of methods live."""


def import_table(design: Path) -> dict[str, set[str]]:
    """Room -> rooms that it may import, from the table under the heading "Rooms" of DESIGN.md."""
    rooms = {}
    section = design.read_text().partition("\n## Rooms\n")[2].partition("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            name = cells[0].strip("`").removesuffix("/").removesuffix(".py")
            rooms[name] = set(re.findall(r"`([a-z_]+)(?:/|\.py)?`", cells[2]))
    return rooms


def table_differences(package: Path, design: Path) -> list[str]:
    """What the code imports but the table does not allow, and what it allows without need."""
    written, found = import_table(design), room_graph(module_graph(package, "salient_ds"))
    problems = [f"{room} is not in the table" for room in sorted(found.keys() - written.keys())]
    problems += [f"the table names {room}, which is not there" for room in sorted(written.keys() - found.keys())]
    for room in sorted(found.keys() & written.keys()):
        problems += [f"{room} imports {other}" for other in sorted(found[room] - written[room])]
        problems += [f"{room} does not import {other}" for other in sorted(written[room] - found[room])]
    return problems


def method_classes(package: Path) -> set[str]:
    """Names of the options and implementation classes of all built-in methods."""
    names = {place.partition(":")[2] for place in BUILT_IN}
    for place in BUILT_IN:
        path = package / Path(*place.partition(":")[0].split(".")[1:]).with_suffix(".py")
        names |= set(re.findall(r'implementation: ClassVar\[str\] = "[\w.]+:(\w+)"', path.read_text()))
    return names


def method_names_outside(package: Path) -> list[str]:
    """Files outside of the methods' rooms that name a method's class."""
    classes, found = method_classes(package), []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if place.parts[0] in METHOD_ROOMS:
            continue
        found += [f"{place}:{line} names {name}" for line, name in used_names(path.read_text()) if name in classes]
    return found


@functools.cache
def used_names(text: str) -> tuple[tuple[int, str], ...]:
    """(line, name) of every name that a file uses or imports from elsewhere."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            found.append((node.lineno, node.id))
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, alias.name) for alias in node.names]
    return tuple(found)


def private_names_outside(package: Path) -> list[str]:
    """Files outside of zero/internals that use a private attribute of DeepSpeed."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if place.parts[:2] == ("zero", "internals"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in PRIVATE_ELSEWHERE:
                found.append(f"{place}:{node.lineno} uses .{node.attr}")
    return found


@pytest.mark.parametrize(("package", "name"), [(PACKAGE, "salient_ds"), (EVALUATION, "salient_eval")])
def test_no_modules_import_each_other_in_a_circle(package: Path, name: str) -> None:
    assert circles(module_graph(package, name)) == []


def test_no_rooms_import_each_other_in_a_circle() -> None:
    assert circles(room_graph(module_graph(PACKAGE, "salient_ds"))) == []


def test_the_import_table_is_what_the_code_does() -> None:
    assert table_differences(PACKAGE, PACKAGE / "DESIGN.md") == []


def test_only_the_methods_rooms_name_a_method() -> None:
    assert {"SalientLoRA", "SalientLoRAConfig", "HeteroLoRA", "LoRA", "LoRAConfig"} <= method_classes(PACKAGE)
    assert method_names_outside(PACKAGE) == []


def test_only_internals_reads_what_deepspeed_does_not_promise() -> None:
    assert private_names_outside(PACKAGE) == []


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A copy of the package to spoil."""
    shutil.copytree(PACKAGE, tmp_path / "salient_ds", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "salient_ds"


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_a_planted_circle_is_found(planted: Path) -> None:
    append(planted / "salience" / "select.py", "\n\ndef f():\n    from salient_ds.methods import base\n")
    assert circles(room_graph(module_graph(planted, "salient_ds"))) == [["methods", "salience"]]
    append(planted / "ranks.py", "\nif TYPE_CHECKING:\n    from salient_ds.adapters.inject import AdaptedModel\n")
    assert ["adapters", "ranks"] in [[r for r in c if r in ("adapters", "ranks")] for c in
                                     circles(room_graph(module_graph(planted, "salient_ds")))]  # fmt: skip


def test_a_planted_import_that_the_table_forbids_is_found(planted: Path) -> None:
    append(planted / "data" / "collate.py", "\nfrom salient_ds.config.run import RunConfig\n")
    assert table_differences(planted, PACKAGE / "DESIGN.md") == ["data imports config"]


def test_a_planted_method_name_is_found(planted: Path) -> None:
    append(planted / "check" / "memory.py", "\nfrom salient_ds.methods.adalora.options import AdaLoRAConfig\n")
    (found,) = method_names_outside(planted)
    assert found.startswith("check/memory.py") and found.endswith("AdaLoRAConfig")


def test_a_planted_private_attribute_is_found(planted: Path) -> None:
    append(planted / "engine" / "build.py", "\n\ndef f(optimizer):\n    return optimizer.fp32_groups_flat\n")
    (found,) = private_names_outside(planted)
    assert found.startswith("engine/build.py") and found.endswith(".fp32_groups_flat")
