"""Arrange ranks by module type and layer, whatever the architecture calls its layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OTHER = "other"


@dataclass(frozen=True)
class ModulePlace:
    """Where a module is in the model, e.g. stack "decoder", kind ("self_attn", "q_proj"), layer 3."""

    stack: str
    kind: tuple[str, ...]
    layer: int | None


@dataclass(frozen=True)
class RankGrid:
    """Ranks of one stack of layers. Rows are module types, columns are layers."""

    stack: str
    """Path in front of the layer number ("model.layers"), or OTHER for modules outside of all layers."""
    rows: tuple[str, ...]
    layers: tuple[int, ...]
    cells: Mapping[tuple[str, int], float]
    """(row, layer) -> rank. Several modules of one type in a layer (experts) give their mean. Modules that are not
    adapted are absent."""


def place_of(path: str) -> ModulePlace:
    """Split a module path at its first number.

    Example: "encoder.block.0.layer.1.DenseReluDense.wi" is in layer 0 of stack "encoder.block". Later numbers
    (sub-layers of T5, experts) are left out of the kind, so the same matrix of all layers is one kind. Without a number
    there is no layer, and the kind is the whole path.
    """
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at == len(parts) - 1:
        return ModulePlace(OTHER, tuple(parts), None)
    kind = tuple(part for part in parts[at + 1 :] if not part.isdigit())
    return ModulePlace(".".join(parts[:at]), kind or tuple(parts[at + 1 :]), int(parts[at]))


def short_labels(kinds: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The shortest ending of each kind that no other kind shares, e.g. "SelfAttention.q" but just "wi"."""
    kinds = list(dict.fromkeys(kinds))
    labels = {}
    for kind in kinds:
        others = [other for other in kinds if other != kind]
        sizes = range(1, len(kind) + 1)
        size = next((n for n in sizes if all(other[-n:] != kind[-n:] for other in others)), len(kind))
        labels[kind] = ".".join(kind[-size:])
    return labels


def _labels(stack: str, places: Iterable[ModulePlace]) -> dict[tuple[str, ...], str]:
    kinds = [place.kind for place in places]
    return {kind: ".".join(kind) for kind in kinds} if stack == OTHER else short_labels(kinds)


def build_grids(ranks: Mapping[str, float]) -> list[RankGrid]:
    """One grid per stack, in order of appearance. Modules outside of layers come last, as layer 0 of OTHER."""
    places = {path: place_of(path) for path in ranks}
    stacks = list(dict.fromkeys(place.stack for place in places.values() if place.layer is not None))
    if any(place.layer is None for place in places.values()):
        stacks.append(OTHER)
    grids = []
    for stack in stacks:
        inside = {path: place for path, place in places.items() if place.stack == stack}
        labels = _labels(stack, inside.values())
        found: dict[tuple[str, int], list[float]] = {}
        for path, place in inside.items():
            found.setdefault((labels[place.kind], place.layer or 0), []).append(ranks[path])
        layers = tuple(sorted({layer for _, layer in found}))
        cells = {key: sum(values) / len(values) for key, values in found.items()}
        grids.append(RankGrid(stack, tuple(dict.fromkeys(labels.values())), layers, cells))
    return grids


def type_labels(paths: Iterable[str]) -> dict[str, str]:
    """Module path -> its type. If there are several stacks, their names come first ("decoder EncDecAttention.q")."""
    places = {path: place_of(path) for path in paths}
    stacks = {place.stack for place in places.values() if place.layer is not None}
    labels: dict[str, str] = {}
    for stack in dict.fromkeys(place.stack for place in places.values()):
        inside = {path: place for path, place in places.items() if place.stack == stack}
        short = _labels(stack, inside.values())
        front = f"{stack_name(stack)} " if len(stacks) > 1 and stack != OTHER else ""
        labels |= {path: front + short[place.kind] for path, place in inside.items()}
    return {path: labels[path] for path in places}


def stack_name(stack: str) -> str:
    """The informative part of a stack's path: "decoder" for "model.decoder.layers", "layers" for "model.layers"."""
    parts = [part for part in stack.split(".") if part != "model"] or [stack]
    telling = [part for part in parts if not re.fullmatch(r"layers?|blocks?|h", part)]
    return (telling or parts)[-1]
