"""Which modules get an adapter: pure name matching, shared by injection and the checks before a run. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from salient_ds.adapters.presets import PREFIX, preset_names
from salient_ds.strict import did_you_mean

ALL_LINEAR = "all-linear"
REGEX_PREFIX = "re:"
SHORTCUT_KINDS = ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn")
LAST_KIND = SHORTCUT_KINDS[-1]
"""This kind starts in the previous layer, so the first layer has none."""
_SHOWN = 12


class NoMatch(ValueError):
    """``adapter.target_modules`` matches no linear layer, or some of its names match none."""

    def __init__(self, message: str, unmatched: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.unmatched = list(unmatched)
        """The listed names that match nothing; empty for a pattern or "all-linear"."""


def select_modules(names: Sequence[str], target_modules: str | Sequence[str]) -> list[str]:
    """The ``names`` that ``target_modules`` selects, in the order of ``names``.

    Args:
        names: paths of all linear layers, e.g. "model.layers.0.self_attn.q_proj".
        target_modules: a list of names (each matches a path that equals it or ends with "." + name), one such
            name, "preset:NAME" (a list of :data:`PRESETS`), "re:PATTERN" (must match the whole path), or "all-linear"
            (all of ``names``).

    Raises:
        NoMatch: nothing matches, or one of the listed names matches nothing (a typo there would silently
            leave a kind of layer unadapted).
        ValueError: the pattern is not a regular expression.
    """
    unmatched = [item for item in listed(target_modules) if not any(is_suffix(name, item) for name in names)]
    if unmatched:
        raise no_match(names, unmatched)
    meant = matcher(target_modules)
    chosen = [name for name in names if meant(name)]
    if not chosen:
        raise NoMatch(
            f"adapter.target_modules={_shown(target_modules)} matches no linear layer of the model; {_available(names)}"
        )
    return chosen


def matcher(target_modules: str | Sequence[str]) -> Callable[[str], bool]:
    """A function that says whether ``target_modules`` matches the path of a layer.

    Raises:
        ValueError: the pattern is not a regular expression.
    """
    if target_modules == ALL_LINEAR:
        return lambda name: True
    if is_pattern(target_modules):
        pattern = str(target_modules).removeprefix(REGEX_PREFIX)
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"adapter.target_modules: {pattern!r} is not a regular expression: {error}") from error
        return lambda name: compiled.fullmatch(name) is not None
    items = listed(target_modules)
    return lambda name: any(is_suffix(name, item) for item in items)


def is_pattern(target_modules: str | Sequence[str]) -> bool:
    """Whether ``target_modules`` is "re:PATTERN"."""
    return isinstance(target_modules, str) and target_modules.startswith(REGEX_PREFIX)


def listed(target_modules: str | Sequence[str]) -> list[str]:
    """The names in ``target_modules``, or of its preset; empty for "all-linear" and for a pattern."""
    if isinstance(target_modules, str) and target_modules.startswith(PREFIX):
        return preset_names(target_modules)
    if not isinstance(target_modules, str):
        return list(target_modules)
    return [] if target_modules == ALL_LINEAR or is_pattern(target_modules) else [target_modules]


def is_shortcut(name: str) -> bool:
    """Whether a module path belongs to a shortcut, judged by its last part."""
    return name.rpartition(".")[2] in SHORTCUT_KINDS


def match_targets(
    linear_shapes: Mapping[str, tuple[int, int]], target_modules: str | Sequence[str]
) -> list[tuple[str, tuple[int, int]]]:
    """(module path, (out features, in features)) of every targeted layer. Raises like :func:`select_modules`."""
    return [(name, linear_shapes[name]) for name in select_modules(list(linear_shapes), target_modules)]


def no_match(names: Sequence[str], unmatched: Sequence[str]) -> NoMatch:
    """The error for listed names that match none of ``names``, with the nearest of them."""
    hints = dict.fromkeys(_nearest(names, item) for item in unmatched)
    return NoMatch(
        f"adapter.target_modules: {', '.join(map(repr, unmatched))} matches no linear layer of the model"
        f"{''.join(hints)}; {_available(names)}",
        unmatched,
    )


def is_suffix(name: str, item: str) -> bool:
    """Whether the path ``name`` is ``item`` or ends with it, in whole parts."""
    return name == item or name.endswith(f".{item}")


def _leaves(names: Sequence[str]) -> list[str]:
    """Distinct last parts of module paths in model order ("q_proj", "k_proj", ...)."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _nearest(names: Sequence[str], item: str) -> str:
    return did_you_mean(item.rpartition(".")[2], _leaves(names), before=", ")


def _available(names: Sequence[str]) -> str:
    leaves = _leaves(names)
    if not leaves:
        return "it has no linear layer at all"
    more = f", ... ({len(leaves)} in all)" if len(leaves) > _SHOWN else ""
    return f"linear layers there are called {', '.join(leaves[:_SHOWN])}{more} (first path: {names[0]})"


def _shown(target_modules: str | Sequence[str]) -> str:
    return repr(target_modules if isinstance(target_modules, str) else list(target_modules))


def shortcut_candidates(linear_names: Sequence[str]) -> list[str]:
    """Paths of all shortcut connections that a model with these linear layers can have, layer by layer.

    Raises:
        ValueError: the model has no numbered layers.
    """
    found = (re.match(r"(.*?\.)?(\d+)\.", name) for name in linear_names)
    layers = list(dict.fromkeys(match.group(0) for match in found if match))
    if not layers:
        raise ValueError("adapter.shortcuts: the model has no numbered layers that shortcuts could join")
    return [f"{layer}{kind}" for layer in layers for kind in SHORTCUT_KINDS if (layer, kind) != (layers[0], LAST_KIND)]


def select_shortcuts(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The ``names`` that ``wanted`` (``adapter.shortcuts.modules``: kinds or paths) selects, in the order of ``names``.

    Raises:
        ValueError: one of ``wanted`` matches nothing.
    """
    unmatched = [item for item in wanted if not any(is_suffix(name, item) for name in names)]
    if unmatched:
        known = [*SHORTCUT_KINDS, *names]
        said = [f"{item!r} is no shortcut of this model{did_you_mean(item, known, ', ')}" for item in unmatched]
        first = f"; the first layer has no {LAST_KIND}" if any(item.endswith(LAST_KIND) for item in unmatched) else ""
        raise ValueError(
            f"adapter.shortcuts.modules: {'; '.join(said)} (kinds: {', '.join(SHORTCUT_KINDS)}; first path: "
            f"{names[0]}{first})"
        )
    return [name for name in names if any(is_suffix(name, item) for item in wanted)]
