"""Who imports whom, read from the source: modules, rooms (folders and files right under the package), circles."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]


def modules(package: Path, name: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package whose import name is ``name``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = (name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path, module: str) -> tuple[str, ...]:
    """Dotted names that a file imports, wherever in it; imports for type checkers count."""
    return _imported(path.read_text(), path.name, module)


@functools.cache  # tests that plant a violation look at a copy of the package
def _imported(text: str, file: str, module: str) -> tuple[str, ...]:
    return tuple(_each_import(ast.parse(text), file, module))


def _each_import(tree: ast.Module, file: str, module: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above if file == "__init__.py" else above[:-1]
                base = ".".join(above[: len(above) - (node.level - 1)] + ([base] if base else []))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_graph(package: Path, name: str) -> Graph:
    """Module -> modules of the same package that it imports (``__init__`` files, which hold no code, left out)."""
    known = modules(package, name)
    wanted = {module for module, path in known.items() if path.name != "__init__.py"}
    return {
        module: {target for target in imported(known[module], module) if target in wanted and target != module}
        for module in wanted
    }


def room_of(module: str) -> str:
    """The folder or file right under the package."""
    return module.split(".")[1]


def room_graph(graph: Graph) -> Graph:
    """Room -> rooms that its modules import."""
    rooms: dict[str, set[str]] = {room_of(module): set() for module in graph}
    for module, targets in graph.items():
        rooms[room_of(module)] |= {room_of(target) for target in targets} - {room_of(module)}
    return rooms


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that reach each other, sorted."""
    reach = {node: _reachable(graph, node) for node in graph}
    groups = {tuple(sorted({other for other in reach[node] if node in reach[other]})) for node in graph}
    return sorted(list(group) for group in groups if len(group) > 1)


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph[waiting.pop()]:
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen
