"""What of a model can be adapted, and which of it a run's ``adapter.target_modules`` means. No torch.

``salient-ds check`` and injection ask the same object, so both name the same layers and say the same about the rest:
experts that are fused into one parameter, towers for images and sound, and linear layers that no adapter can wrap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from salient_ds.adapters.full import is_inside
from salient_ds.adapters.targets import NoMatch, is_pattern, is_suffix, listed, matcher, no_match, select_modules

Targets = str | Sequence[str]
_TRAINED = "it is trained in full (adapter.also_train)"


@dataclass(frozen=True)
class FusedExperts:
    """Experts whose matrices are slices of larger parameters. No ``nn.Linear`` computes them."""

    parameters: tuple[str, ...]
    """Paths of the parameters, in model order."""
    experts: int
    """Number of experts of a layer; 0 if unknown."""
    axes: int
    """Number of axes of the first parameter."""
    names: tuple[str, ...]
    """What a matrix of an expert is called, here and in checkpoints: "gate_up_proj", "gate_proj", "w1", ..."""

    @property
    def sentence(self) -> str:
        """One sentence without its full stop: what the experts are, and that they are not adapted."""
        layers = [name[: match.end()] if (match := re.search(r"\.\d+\.", name)) else "" for name in self.parameters]
        more = layers.count(layers[0]) - 1
        numbers = [f"{self.parameters[0]} and {more} more per layer" if more else self.parameters[0]]
        numbers += [f"{self.experts} experts"] if self.experts else []
        numbers.append(f"{len(set(layers))} layer{'s' if len(set(layers)) > 1 else ''}")
        return (
            f"the experts are fused {self.axes}-D parameters ({', '.join(numbers)}) and are not adapted: adapters go "
            "on attention and other linear layers only"
        )


@dataclass(frozen=True)
class Adaptable:
    """The linear layers of a model, and what else a user could mean by the name of a layer."""

    linears: Mapping[str, tuple[int, int]]
    """Module path -> (out features, in features) of every layer that an adapter can wrap, in model order. The output
    layer is left out."""
    towers: tuple[str, ...] = ()
    """Paths of the parts for images and sound. Their layers are adapted only if they are named explicitly."""
    experts: FusedExperts | None = None
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Module path -> reason, of every linear layer that an adapter cannot wrap."""

    def select(self, wanted: Targets) -> list[str]:
        """The paths of the layers that ``wanted`` (``adapter.target_modules``) means, in model order.

        "all-linear" and names mean the language model only. A layer of a tower is meant by its full path, by a longer
        name that holds the tower's ("vision_tower.encoder.layers.0.mlp.fc1"), or by a pattern with the tower's name.

        Raises:
            ValueError: nothing matches, or one of the listed names matches nothing. The message says if a name means
                something else that is there.
        """
        names = [name for name in self.linears if (tower := self._tower(name)) is None or _means(wanted, name, tower)]
        try:
            return select_modules(names, wanted)
        except NoMatch as error:
            raise ValueError(self._why_not(names, wanted, error)) from None

    def notes(self, wanted: Targets) -> list[str]:
        """What is not adapted although ``wanted`` could seem to mean it, one sentence each. Raises like ``select``."""
        chosen, meant = set(self.select(wanted)), matcher(wanted)
        notes = [self.experts.sentence + self._beside_experts(wanted)] if self.experts is not None else []
        left = [name for name in self.linears if name not in chosen and meant(name)]
        if left:
            towers = dict.fromkeys(str(self._tower(name)) for name in left)
            notes.append(
                f"{_some(left)} left out, in {', '.join(towers)}: adapters go on the language model only, unless "
                f"adapter.target_modules gives full paths or a pattern with {_last(towers)}"
            )
        reasons: dict[str, list[str]] = {}
        for name, reason in self.unfit.items():
            if self._tower(name) is None and meant(name):
                reasons.setdefault(reason, []).append(name)
        return notes + [f"{_some(names)} left out: {reason}" for reason, names in reasons.items()]

    def without(self, trained: Sequence[str]) -> Adaptable:
        """The same model with the modules ``trained`` in full: no adapter wraps a layer in them."""
        inside = [name for name in self.linears if any(is_inside(name, module) for module in trained)]
        rest = {name: shape for name, shape in self.linears.items() if name not in inside}
        return replace(self, linears=rest, unfit={**self.unfit, **dict.fromkeys(inside, _TRAINED)})

    def _tower(self, name: str) -> str | None:
        return next((tower for tower in self.towers if name == tower or name.startswith(f"{tower}.")), None)

    def _beside_experts(self, wanted: Targets) -> str:
        """Says so if listed names are those of experts, but match only layers beside them."""
        assert self.experts is not None
        items = [item for item in listed(wanted) if item.rpartition(".")[2] in self.experts.names]
        first = next((name for name in self.linears if any(is_suffix(name, item) for item in items)), None)
        if first is None:
            return ""
        return f"; {', '.join(map(repr, items))} match shared experts and dense layers only, such as {first}"

    def _why_not(self, names: Sequence[str], wanted: Targets, error: NoMatch) -> str:
        """The error's text, with the reason where something of that name is there."""
        if not error.unmatched:
            meant = matcher(wanted)
            reasons = dict.fromkeys(self._reason(name, name) for name in [*self.linears, *self.unfit] if meant(name))
            if self.experts is not None and not reasons:
                reasons[self.experts.sentence] = None
            return "; ".join([str(error), *reasons])
        grouped: dict[str, list[str]] = {}
        for item in error.unmatched:
            where = [name for name in [*self.linears, *self.unfit] if is_suffix(name, item)]
            grouped.setdefault(self._reason(item, *where), []).append(item)
        plain = grouped.pop("", [])
        said = [f"adapter.target_modules: {', '.join(map(repr, items))}: {why}" for why, items in grouped.items()]
        return "; ".join(said + ([str(no_match(names, plain))] if plain else []))

    def _reason(self, item: str, *where: str) -> str:
        """Why no layer is adapted for ``item``, which matches the layers ``where``; empty if it means nothing here."""
        towers = dict.fromkeys(tower for name in where if (tower := self._tower(name)) is not None)
        if towers:
            return (
                f"layers of that name are in {', '.join(towers)} only, which is left out unless it is named "
                f"explicitly: give full paths or a pattern with {_last(towers)}"
            )
        if where:
            return f"{where[0]} cannot be adapted ({self.unfit[where[0]]}), leave it out"
        if self.experts is not None and item.rpartition(".")[2] in self.experts.names:
            return f"only experts are called that, and {self.experts.sentence}; leave such names out"
        return ""

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Adaptable:
        """Read what :meth:`to_json` made."""
        experts = data["experts"]
        if experts is not None:
            names = {key: tuple(experts[key]) for key in ("parameters", "names")}
            experts = FusedExperts(**{**experts, **names})
        return cls(
            linears={name: (tall, wide) for name, (tall, wide) in data["linears"].items()},
            towers=tuple(data["towers"]),
            experts=experts,
            unfit=dict(data["unfit"]),
        )


def _means(wanted: Targets, name: str, tower: str) -> bool:
    """Whether ``wanted`` names the layer ``name`` of ``tower`` explicitly."""
    own = tower.rpartition(".")[2]
    if is_pattern(wanted):
        return own in wanted
    return any(item == name or (is_suffix(name, item) and own in item.split(".")) for item in listed(wanted))


def _last(towers: Iterable[str]) -> str:
    return " or ".join(repr(tower.rpartition(".")[2]) for tower in towers)


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} linear layers, such as {names[0]}, are"
