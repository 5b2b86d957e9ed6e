"""Converts TOML files of HeteroLoRA's released code (lora_*.toml, ags_*.toml) to the ``adapter`` section of our YAML.

A file has a granularity, a ``[default]`` table and specific tables. With granularity "network" a specific table such as
``[all_layers.q_proj]`` is for all layers. With granularity "layer", ``[model_layer_3.q_proj]`` is for one layer. A
specific table replaces the default table as a whole. A rank of 0 means that there is no module. No torch.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from salient_ds.strict import did_you_mean

Granularity = Literal["network", "layer"]


@dataclass(frozen=True)
class ReleasedNames:
    """Where a model's layers are, and which of their modules the files' short names mean."""

    layers: str
    projections: dict[str, str]
    """Path inside a layer, by the name used in the files. Two names may mean the same path."""


_ATTENTION = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
_GATED = ReleasedNames(
    "model.layers",
    _ATTENTION
    | {"w1": "mlp.up_proj", "up": "mlp.up_proj", "gate": "mlp.gate_proj"}
    | {"w2": "mlp.down_proj", "down": "mlp.down_proj"},
)
ARCHITECTURES = {
    "opt": ReleasedNames(
        "model.decoder.layers", _ATTENTION | {"o_proj": "self_attn.out_proj", "w1": "fc1", "w2": "fc2"}
    ),
    "llama": _GATED,
    "qwen2": _GATED,
    "gemma": _GATED,
    "roberta": ReleasedNames(
        "roberta.encoder.layer",
        {
            "q_proj": "attention.self.query",
            "k_proj": "attention.self.key",
            "v_proj": "attention.self.value",
            "o_proj": "attention.output.dense",
            "w1": "intermediate.dense",
            "w2": "output.dense",
        },
    ),
}
"""By ``model_type`` of the model's config.json."""
SHORTCUTS = {
    "residual1": "residual_1",
    "residual2": "residual_2",
    "shortcut1": "shortcut_sa",
    "shortcut2": "shortcut_ffn",
}
_IGNORED = ("init_lora_weghts", "init_lora_weights", "fan_in_fan_out")
"""Keys that the released code reads but does not use either. Its spelling of the first one is kept."""


@dataclass(frozen=True)
class _Dialect:
    """Key names of one of the two kinds of files."""

    alpha: str
    dropout: str
    name: str
    disable: str

    @property
    def keys(self) -> tuple[str, ...]:
        return ("r", self.alpha, self.dropout, self.name, self.disable, *_IGNORED)


_LORA = _Dialect("lora_alpha", "lora_dropout", "adapter_name", "disable_adapter")
_SHORTCUT = _Dialect("shortcut_alpha", "proj_dropout", "projector_name", "disable_projector")


@dataclass(frozen=True)
class _Setting:
    rank: int
    alpha: float
    dropout: float


def convert(
    lora: Path,
    shortcuts: Path | None = None,
    model_type: str = "opt",
    num_layers: int | None = None,
    norm_after_shortcut: Literal["none", "reuse"] = "none",
) -> dict[str, Any]:
    """The ``adapter`` section that is equivalent to one or two files of the released code.

    Args:
        model_type: one of ``ARCHITECTURES``; the files do not state it.
        num_layers: number of layers of the model; needed for a "layer" file whose default rank is above 0.
        norm_after_shortcut: the files do not state it either. The released code always does what "reuse" does.

    Returns:
        ``{"adapter": {...}}``, as :func:`salient_ds.config.run.parse_config` takes it.

    Raises:
        ValueError: everything that has no counterpart here, one sentence per line: granularity "head", ranks, alphas or
            dropouts that differ between modules, unknown tables and keys, modules that exist but are disabled.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(f"model_type={model_type!r}: files can be converted for {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    problems: list[str] = []
    linear = _File(lora, _LORA, architecture.projections, problems).chosen(num_layers)
    added = _File(shortcuts, _SHORTCUT, SHORTCUTS, problems).chosen(num_layers) if shortcuts else _Chosen({}, None)
    if not problems and linear.setting is None and added.setting is None:
        problems.append(f"{lora}: every rank is 0, so that nothing would be trained")
    if problems:
        raise ValueError("\n".join(problems))
    section: dict[str, Any] = {"target_modules": _targets(linear, architecture)}
    section |= _numbers(linear.setting or added.setting)
    if added.setting is not None:
        modules = _paths(added, architecture.layers, without="0.shortcut_ffn")
        norm = {"norm_after_shortcut": norm_after_shortcut}
        section["shortcuts"] = {"modules": modules, **_numbers(added.setting), **norm}
    return {"adapter": section}


def to_yaml(section: dict[str, Any]) -> str:
    """:func:`convert`'s result as YAML text for a run file."""
    import yaml

    return str(yaml.safe_dump(section, sort_keys=False, default_flow_style=None, width=110))


@dataclass(frozen=True)
class _Chosen:
    """Modules with a rank above 0: layer numbers by path inside a layer (None: all layers), and their one setting."""

    layers: dict[str, list[int] | None]
    setting: _Setting | None


def _numbers(setting: _Setting | None) -> dict[str, Any]:
    assert setting is not None
    return {"rank": setting.rank, "alpha": setting.alpha, "dropout": setting.dropout}


def _paths(chosen: _Chosen, layers: str, without: str = "") -> list[str]:
    """The names as they are if they apply to all layers; otherwise full paths, layer by layer."""
    if all(numbers is None for numbers in chosen.layers.values()):
        return list(chosen.layers)
    pairs = sorted((number, k) for k, numbers in enumerate(chosen.layers.values()) for number in numbers or [])
    names = list(chosen.layers)
    tails = [f"{number}.{names[k]}" for number, k in pairs]
    return [f"{layers}.{tail}" for tail in tails if tail != without]


def _targets(chosen: _Chosen, architecture: ReleasedNames) -> str | list[str]:
    paths = _paths(chosen, architecture.layers)
    if any(path == "output.dense" for path in paths):
        # as a suffix it would also mean attention.output.dense
        inner = "|".join(re.escape(path) for path in paths)
        return rf"re:{re.escape(architecture.layers)}\.\d+\.({inner})"
    return [path.removeprefix("self_attn.").removeprefix("mlp.") for path in paths]


class _File:
    """One file; what is wrong with it is added to ``problems``."""

    def __init__(self, path: Path, dialect: _Dialect, known: dict[str, str], problems: list[str]) -> None:
        self.path, self.dialect, self.known, self.problems = path, dialect, known, problems
        self.granularity: Granularity = "network"
        self.default: dict[str, Any] | None = None
        self.specific: dict[tuple[int | None, str], dict[str, Any]] = {}
        self._read()

    def _problem(self, text: str) -> None:
        self.problems.append(f"{self.path}: {text}")

    def _read(self) -> None:
        try:
            data = tomllib.loads(Path(self.path).read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            self._problem(f"cannot be read: {'it is nested too deeply' if type(error) is RecursionError else error}")
            return
        granularity = data.pop("granularity", None)
        if granularity == "head":
            self._problem(
                'granularity = "head": an adapter here belongs to a whole projection (the released code uses head_0 '
                'only, too); write the file with granularity = "layer"'
            )
            return
        if granularity not in ("network", "layer"):
            self._problem(f'granularity = {granularity!r}: must be "network" or "layer", at the top of the file')
            return
        self.granularity = granularity
        default = data.pop("default", None)
        if default is not None:
            self.default = self._table("default", default)
        for outer, tables in data.items():
            self._specific(outer, tables)

    def _specific(self, outer: str, tables: Any) -> None:
        """Tables ``[all_layers.NAME]`` or ``[model_layer_i.NAME]``."""
        pattern = "all_layers" if self.granularity == "network" else r"model_layer_(\d+)"
        found = re.fullmatch(pattern, outer)
        if found is None or not isinstance(tables, dict):
            wanted = "[all_layers.NAME]" if self.granularity == "network" else "[model_layer_NUMBER.NAME]"
            self._problem(f'[{outer}] has no meaning with granularity = "{self.granularity}": expected {wanted}')
            return
        layer = int(found[1]) if self.granularity == "layer" else None
        for name, table in tables.items():
            if name not in self.known:
                self._problem(f"[{outer}.{name}]: {_nearest(name, list(self.known))}")
            elif (layer, self.known[name]) in self.specific:
                self._problem(f"[{outer}.{name}] and another table mean the same module, {self.known[name]}")
            else:
                self.specific[layer, self.known[name]] = self._table(f"{outer}.{name}", table)

    def _table(self, title: str, table: Any) -> dict[str, Any]:
        if not isinstance(table, dict):
            self._problem(f"[{title}] must be a table of keys")
            return {}
        for key in table:
            if key not in self.dialect.keys:
                self._problem(f"[{title}] {key}: {_nearest(key, list(self.dialect.keys))}")
        return {key: value for key, value in table.items() if value != "NA"}  # NA: not given

    def chosen(self, num_layers: int | None) -> _Chosen:
        """Modules with a rank above 0, in the order of ``known``."""
        if self.granularity == "network":
            return self._settle({name: self._all_layers(name) for name in dict.fromkeys(self.known.values())})
        listed = [layer for layer, _ in self.specific if layer is not None]
        if num_layers is None and self._setting("default", self.default or {"r": 0}) is not None:
            self._problem('the default rank is above 0 with granularity = "layer": say how many layers the model has')
        count = num_layers if num_layers is not None else max(listed, default=-1) + 1
        if listed and max(listed) >= count:
            self._problem(f"[model_layer_{max(listed)}]: the model has {count} layers, 0 to {count - 1}")
        names = dict.fromkeys(self.known.values())
        return self._settle({name: {i: self._of(i, name) for i in range(count)} for name in names})

    def _all_layers(self, name: str) -> dict[int, _Setting | None]:
        return {-1: self._of(None, name)}

    def _of(self, layer: int | None, name: str) -> _Setting | None:
        title = f"{'all_layers' if layer is None else f'model_layer_{layer}'}.{name}"
        if (layer, name) in self.specific:
            return self._setting(title, self.specific[layer, name])
        return None if self.default is None else self._setting("default", self.default)

    def _setting(self, title: str, table: dict[str, Any]) -> _Setting | None:
        """Rank, alpha and dropout; None if there is no module, or if there is a problem, which is then noted."""
        rank = table.get("r")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            self._note(f"[{title}] r = {rank!r}: must be a whole number, 0 for no module")
            return None
        if rank == 0:
            return None
        alpha, dropout = table.get(self.dialect.alpha), table.get(self.dialect.dropout, 0.0)
        if not isinstance(alpha, int | float) or alpha <= 0:
            self._note(f"[{title}] {self.dialect.alpha} = {alpha!r}: must be a number above 0")
            return None
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            self._note(f"[{title}] {self.dialect.dropout} = {dropout!r}: must be at least 0 and below 1")
            return None
        if table.get(self.dialect.disable, False) is not False:
            self._note(
                f"[{title}] r = {rank} with {self.dialect.disable} = true: a module that exists and is off has no "
                "counterpart; set r = 0 to leave it out, or enable it"
            )
            return None
        return _Setting(rank, float(alpha), float(dropout))

    def _note(self, text: str) -> None:
        """Add a problem only once: a default table applies to many modules."""
        if f"{self.path}: {text}" not in self.problems:
            self._problem(text)

    def _settle(self, found: dict[str, dict[int, _Setting | None]]) -> _Chosen:
        live = {name: {i: s for i, s in by_layer.items() if s is not None} for name, by_layer in found.items()}
        live = {name: by_layer for name, by_layer in live.items() if by_layer}
        settings = {s: f"{name} of layer {i}" if i >= 0 else name for name, by in live.items() for i, s in by.items()}
        if len(settings) > 1:
            shown = "; ".join(f"{_shown(s, self.dialect)} ({place})" for s, place in list(settings.items())[:3])
            self._problem(f"modules differ in rank, alpha or dropout, which must be the same for all here: {shown}")
        layers = {name: None if -1 in by_layer else sorted(by_layer) for name, by_layer in live.items()}
        return _Chosen(layers, next(iter(settings), None))


def _shown(setting: _Setting, dialect: _Dialect) -> str:
    return f"r = {setting.rank}, {dialect.alpha} = {setting.alpha:g}, {dialect.dropout} = {setting.dropout:g}"


def _nearest(name: str, known: list[str]) -> str:
    return did_you_mean(name, known, before="unknown name, ") or f"unknown name (known: {', '.join(known)})"
