"""Writes and loads adapters with shortcut connections, in a format of our own: PEFT's cannot hold shortcuts.

One call loads an adapter:

    model = load_shortcuts(AutoModelForCausalLM.from_pretrained(base), "runs/my-run/adapter")

Shape legend: I = in features, O = out features, r = live rank of a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from salient_ds.adapters.ranked_linear import PlainLinear, RankedLinear
from salient_ds.adapters.targets import is_shortcut
from salient_ds.export.atomic import atomic_directory
from salient_ds.export.fold import AdapterFactors, LoraPair, fold
from salient_ds.export.meta import ExportMeta, write_json, write_record
from salient_ds.export.peft_format import check_factors
from salient_ds.heterolora.shortcut import NormAfterShortcut, Shortcut, ShortcutKind
from salient_ds.heterolora.shortcut_wiring import shortcut_names, wire_shortcuts
from salient_ds.own_files import read_object, reading

WEIGHTS, SETTINGS = "shortcut_adapter.safetensors", "shortcut_adapter.json"
FORMAT = 1


def shortcuts_act(factors: Sequence[AdapterFactors], norm_after_shortcut: str | None) -> bool:
    """Whether the adapter does more than update linear layers.

    Args:
        norm_after_shortcut: the run's setting; None for a run without shortcuts. "reuse" changes the model's function
            even if all shortcuts are off.
    """
    return norm_after_shortcut == "reuse" or any(is_shortcut(item.name) and item.rank for item in factors)


def refuse_shortcuts(factors: Sequence[AdapterFactors], form: str, norm_after_shortcut: str | None) -> None:
    """Raise ValueError if shortcuts act (:func:`shortcuts_act`): ``form`` cannot express them."""
    if not shortcuts_act(factors, norm_after_shortcut):
        return
    live = [item.name for item in factors if is_shortcut(item.name) and item.rank]
    what = f"{len(live)} shortcuts are on ({live[0]}, ...)" if live else "norm_after_shortcut=reuse changes every layer"
    raise ValueError(
        f"form {form!r} cannot hold this adapter: {what}, and a shortcut is a connection of its own that no LoRA "
        "format or weight of the base can express. Export with --form shortcuts (loaded by load_shortcuts of "
        "salient_ds.heterolora.export), or search and train without adapter.shortcuts"
    )


def write_shortcuts(
    target: Path,
    factors: Sequence[AdapterFactors],
    meta: ExportMeta,
    base: Path | str,
    *,
    norm_after_shortcut: str | None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    trained: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write weights, settings and ``salient_ds.json`` to ``target``, all or nothing.

    Modules that are off are left out. Scales are folded into the factors, as in the other forms.

    Args:
        trained: parameters trained in full (a classification head), by full name.

    Raises:
        ValueError: there is nothing to export, or a value is not finite.
        OSError: the disk is full; ``target`` is unchanged.
    """
    check_factors(factors)
    pairs = [pair for pair in map(fold, factors) if pair is not None]
    tensors = {f"{p.name}.lora_{f}": v.to(dtype).contiguous() for p in pairs for f, v in _halves(p)}
    tensors |= {name: value.to(dtype).clone().contiguous() for name, value in (trained or {}).items()}
    settings = {
        "format": FORMAT,
        "in_full": sorted(trained or {}),
        "norm_after_shortcut": norm_after_shortcut or "none",
        "ranks": {pair.name: pair.rank for pair in pairs},
    }
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    with atomic_directory(target, overwrite, size, protected=(base, meta.source_run)) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / SETTINGS, settings)
        write_record(folder, factors, meta, "shortcuts", meta.base_name(base), str(dtype).removeprefix("torch."))
    return target


def _halves(pair: LoraPair) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    return ("A", pair.A_rI), ("B", pair.B_Or)


def load_shortcuts(model: nn.Module, path: Path | str) -> nn.Module:
    """Add a saved adapter to its base model, in place, and return the model.

    The model is then ready for inference; none of its parameters is trainable.

    Args:
        model: the base model as transformers loads it, in any dtype and on any device.
        path: a directory written by an export with form "shortcuts".

    Raises:
        ValueError: ``path`` is not such a directory, has another format version, or was made for another model.
    """
    folder = Path(path)
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} holds no {SETTINGS}: give the directory of an export with --form shortcuts")
    settings = read_object(folder / SETTINGS)
    if settings.get("format") != FORMAT:
        raise ValueError(f"{folder / SETTINGS} has format {settings.get('format')}, this version reads {FORMAT}")
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): export the adapter again") from error
    with reading(folder / SETTINGS):
        ranks = {str(name): int(rank) for name, rank in settings["ranks"].items()}
    linears = {name: rank for name, rank in ranks.items() if not is_shortcut(name)}
    shortcuts = {name: rank for name, rank in ranks.items() if is_shortcut(name)}
    _check_names(model, linears, shortcuts, folder)
    in_full = _parameters(model, settings.get("in_full", ()), weights, folder)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, rank in linears.items():
        base = cast(nn.Linear, model.get_submodule(name))
        wrapped = PlainLinear(base, rank, 1.0, dtype=base.weight.dtype, device=base.weight.device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _filled(wrapped, name, weights))
    if shortcuts or settings["norm_after_shortcut"] == "reuse":
        _add(model, shortcuts, weights, settings["norm_after_shortcut"])
    for name, parameter in in_full.items():
        parameter.data.copy_(weights[name])
    return model


def _parameters(
    model: nn.Module, names: Iterable[str], weights: Mapping[str, Tensor], folder: Path
) -> dict[str, nn.Parameter]:
    """The parameters that were trained in full, by name."""
    here = dict(model.named_parameters(remove_duplicate=False))
    wrong = [name for name in names if name not in here or here[name].shape != weights[name].shape]
    if wrong:
        raise ValueError(
            f"{folder} holds {wrong[0]!r} in full, which this model lacks or has in another shape: load the model with "
            "the head, and the number of classes, that were trained"
        )
    return {name: here[name] for name in names}


def _check_names(model: nn.Module, linears: Mapping[str, int], shortcuts: Mapping[str, int], folder: Path) -> None:
    here = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    possible = set(shortcut_names(model)) if shortcuts else set()
    missing = [name for name in linears if name not in here] + [name for name in shortcuts if name not in possible]
    if missing:
        raise ValueError(
            f"{folder} was made for another model: this one has no {missing[0]!r} ({len(missing)} of "
            f"{len(linears) + len(shortcuts)} modules are missing)"
        )


def _add(model: nn.Module, shortcuts: Mapping[str, int], weights: Mapping[str, Tensor], norm: str) -> None:
    config: Any = model.config
    size = config.get_text_config().hidden_size
    added: dict[str, Shortcut] = {}
    for name, rank in shortcuts.items():
        like = next(model.get_submodule(name.rpartition(".")[0]).parameters())
        kind = cast(ShortcutKind, name.rpartition(".")[2])
        module = Shortcut(kind, size, rank, 1.0, dtype=like.dtype, device=like.device)
        added[name] = cast(Shortcut, _filled(module, name, weights))
    wire_shortcuts(model, added, cast(NormAfterShortcut, norm))


@torch.no_grad()
def _filled(adapter: RankedLinear, name: str, weights: Mapping[str, Tensor]) -> RankedLinear:
    for factor, address in adapter.factors().items():
        address.parameter.copy_(weights[f"{name}.lora_{factor}"])
        address.parameter.requires_grad_(False)
    adapter.rank_mask_R = adapter.rank_mask_R.to(next(adapter.parameters()).device)
    return adapter.eval()
