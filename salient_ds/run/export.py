"""Exports what a run trained, from its newest or a given checkpoint, without DeepSpeed or a process group."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

from salient_ds.adapters.targets import is_shortcut
from salient_ds.adapters.two_scale import two_scale_pair
from salient_ds.engine.shard_files import (
    MANIFEST,
    CheckpointError,
    ShardReader,
    choose_whole,
    damage,
)
from salient_ds.export.api import export_adapter, form_by_size
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.meta import ExportMeta, Form
from salient_ds.export.peft_format import PadTo
from salient_ds.heterolora.export import refuse_shortcuts, shortcuts_act, write_shortcuts
from salient_ds.models.loading import PEFT_TASK_TYPES
from salient_ds.own_files import read_object, read_settings, reading
from salient_ds.run.adapter_folder import card_facts, complete

_FORMS_THAT_DROP_MASKED = ("GrowingLinear", "SwitchedLinear", "Shortcut")
"""Forms of adapters that drop masked rows, for checkpoints from before 2026-11-26, which do not state it."""


def say_aloud(text: str) -> None:
    """Print a sentence for the user."""
    print(text, file=sys.stderr, flush=True)


def newest_checkpoint(run: Path, say: Callable[[str], None] = say_aloud) -> Path:
    """The last whole checkpoint of a run directory, or ``run`` itself if it is a checkpoint. Contents are verified.

    Args:
        say: is told which later checkpoints are damaged, and how.

    Raises:
        CheckpointError: the run has no checkpoint, or only damaged ones.
    """
    if (run / MANIFEST).is_file():
        return run
    found = choose_whole(run / "checkpoints", say)
    if found is None:
        raise CheckpointError(f"{run} holds no whole checkpoint: train it first, or continue it with --resume auto")
    return found


def best_checkpoint(run: Path, say: Callable[[str], None] = say_aloud) -> Path | None:
    """The checkpoint that a finished run chose by ``train.best_metric``; None if it chose none, or is not finished.

    If its summary or that checkpoint is damaged, ``say`` is told, and the answer is None.
    """
    summary = run / "summary.json"
    if not summary.is_file():
        return None
    try:
        best = read_object(summary).get("best")
    except (OSError, ValueError) as error:
        say(f"{error}. Without it, the last checkpoint is taken for the best")
        return None
    step = best.get("step") if isinstance(best, dict) else None
    if not isinstance(step, int):
        return None
    path = run / "checkpoints" / f"step-{step:08d}"
    problem = damage(path, contents=True) if path.exists() else f"{path} is missing"
    if problem is not None:
        say(f"the best checkpoint is damaged ({problem}): taking the last one instead")
        return None
    return path


class CheckpointFactors:
    """The adapters of a checkpoint, read one at a time as fp32 CPU tensors, with the mask of the rows that count.

    Before the last event of a method that lets dropped rows grow back (AdaLoRA, LoRA^2), all rows count. While
    IncreLoRA still grows, its reserve rows (singular values of 1e-5) do not.

    Raises:
        CheckpointError: a file does not have the content that was written.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._reader = ShardReader(checkpoint)
        self._place = checkpoint / MANIFEST
        with reading(self._place):
            adapters = self._reader.manifest["adapters"]
            latest = self._reader.shared()["latest"]
            masks = latest["mask_N"].split([_whole_number(item["rank"]) for item in adapters])
            self._found = {
                str(item["name"]): (item, mask if latest["hold"] or _drops_masked(item) else mask | True)
                for item, mask in zip(adapters, masks, strict=True)
            }

    @property
    def names(self) -> list[str]:
        """Paths of all adapted modules, shortcuts included."""
        return list(self._found)

    def read(self, name: str) -> AdapterFactors:
        """One adapter."""
        with reading(self._place):
            return _factors(self._reader, *self._found[name])


def read_factors(checkpoint: Path) -> list[AdapterFactors]:
    """All adapters of a checkpoint (:class:`CheckpointFactors`)."""
    adapters = CheckpointFactors(checkpoint)
    return [adapters.read(name) for name in adapters.names]


def read_in_full(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The parameters that were trained in full, as fp32 CPU tensors, by name. A tied one comes under all its names."""
    reader = ShardReader(checkpoint, contents=False)
    found: dict[str, torch.Tensor] = {}
    with reading(checkpoint / MANIFEST):
        for item in reader.manifest.get("in_full", ()):
            value = reader.read("master", item["name"], 0, prod(item["shape"])).view(item["shape"]).float()
            found |= dict.fromkeys(item["names"], value)
    return found


def _task(config: dict[str, Any]) -> dict[str, Any] | None:
    """What ``salient-ds evaluate`` needs to score the adapter by itself; None for instructions."""
    data = config["data"]
    if data.get("task") is None:
        return None
    attention = config["model"]["attn_implementation"]
    return {"task": data["task"], "max_length": data["max_length"], "attn_implementation": attention}


def _whole_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no rank")
    return value


def _drops_masked(item: dict[str, Any]) -> bool:
    return bool(item.get("drops_masked", item["form"] in _FORMS_THAT_DROP_MASKED))


def _factors(reader: ShardReader, item: dict[str, Any], mask: torch.Tensor) -> AdapterFactors:
    def read(factor: str) -> torch.Tensor:
        shape = item["shapes"][factor]
        return reader.read("master", item["factors"][factor], 0, int(torch.tensor(shape).prod())).view(shape).float()

    sigma = read("E") if "E" in item["factors"] else None
    A, B = read("A"), read("B")
    if "aa" in item["factors"]:
        A, B = two_scale_pair(A, B, read("aa"), read("bb"))
    return AdapterFactors(item["name"], A, sigma, B, mask, item["scaling"])


def checkpoint_facts(run: Path, checkpoint: Path) -> tuple[dict[str, Any], ExportMeta, dict[str, Any] | None]:
    """The configuration of a checkpoint's run, what an export of it records, and what config.json says of its head."""
    folder = run if (run / "run.yaml").is_file() else checkpoint.parent.parent
    config, facts = read_settings(folder / "run.yaml"), read_object(folder / "run.json")
    with reading(folder / "run.yaml"):
        config["adapter"].get("shortcuts")
        str(config["model"]["path"])
        meta = ExportMeta(
            method=config["method"]["name"],
            task_type=PEFT_TASK_TYPES[config["model"]["task"]],  # type: ignore[arg-type]
            source_run=str(checkpoint),
            template=facts.get("template"),
            task=_task(config),
            revision=config["model"].get("revision"),
            card=card_facts(folder, config, checkpoint),
        )
    return config, meta, facts.get("head")


def export_run(
    run: Path,
    form: Form | None,
    target: Path | None,
    *,
    overwrite: bool = False,
    checkpoint: Path | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    pad_to: PadTo = None,
    say: Callable[[str], None] = say_aloud,
) -> Path:
    """Write the run's adapter (or merged model) to ``target``.

    Args:
        run: run directory with run.yaml and run.json beside its checkpoints, or one of these checkpoints.
        form: None chooses "padded" or "ragged" by size, or "shortcuts" for an adapter that no other form can hold.
        target: None for the folder export-FORM in the run.
        overwrite: replace what ``target`` holds.
        checkpoint: the checkpoint to export (default: the best one, if the run chose it by a metric, else the newest).
        base: base model, if it is not where training found it.
        dtype: of the tensors (default: float32 for an adapter, as in the base for a merged model).
        pad_to: rank of the form "padded"; see :func:`salient_ds.export.peft_format.write_peft`.
        say: is told which checkpoints are damaged, so that an older one is exported.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ValueError: the export is not possible as asked; the message gives the remedy.
    """
    chosen = checkpoint or best_checkpoint(run, say) or newest_checkpoint(run, say)
    config, meta, head = checkpoint_facts(run, chosen)
    factors, place = read_factors(chosen), base or config["model"]["path"]
    norm = (config["adapter"].get("shortcuts") or {}).get("norm_after_shortcut")
    if form is None:
        form = (
            "shortcuts" if shortcuts_act(factors, norm) else "padded" if pad_to is not None else form_by_size(factors)
        )
    target = target or run / f"export-{form}"
    if form == "shortcuts":
        return write_shortcuts(
            target, factors, meta, place, norm_after_shortcut=norm, dtype=dtype or torch.float32, overwrite=overwrite,
            trained=read_in_full(chosen),
        )  # fmt: skip
    refuse_shortcuts(factors, form, norm)
    factors = [item for item in factors if not is_shortcut(item.name)]  # all of them off
    return export_adapter(
        factors,
        meta,
        target,
        form,
        place,
        dtype,
        overwrite,
        pad_to=pad_to,
        trained=read_in_full(chosen),
        config_updates=head if form == "merged" else None,
        also=lambda folder: complete(folder, config, factors, str(place), f"Ranks of {run.resolve().name}"),
    )
