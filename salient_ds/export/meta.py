"""What an export records about itself, beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from salient_ds import __version__
from salient_ds.export.fold import AdapterFactors

RECORD_FILE = "salient_ds.json"
TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS"]
Form = Literal["ragged", "peft", "padded", "gguf", "merged", "shortcuts"]
"""How an adapter is written. "peft" is the older name of "ragged"."""
_PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")


def installed_versions() -> dict[str, str]:
    """Versions of this package and of those that determine what a checkpoint means; missing packages are left out."""
    found = {"salient_ds": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class ExportMeta:
    """Facts about an export that its weights do not hold.

    Raises:
        ValueError: PEFT does not know the task type.
    """

    method: str
    """Name of the rank-allocation method."""
    task_type: TaskType
    source_run: str
    """Run directory or checkpoint that the adapter was taken from."""
    template: Mapping[str, Any] | None = None
    """Name of the prompt template and hash of a rendered sample. Evaluation refuses any other template."""
    task: Mapping[str, Any] | None = None
    """The task with a metric that it was trained for: its description, the length of rows, and attention."""
    base_model: str | None = None
    """Value of ``base_model_name_or_path`` (default: where the base is read from)."""
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    revision: str | None = None
    """Revision of a base model on the hub that was trained on."""
    card: Mapping[str, Any] | None = None
    """Facts for the model card (:func:`salient_ds.export.card.card_text`)."""

    def __post_init__(self) -> None:
        if self.task_type not in get_args(TaskType):
            raise ValueError(f"task_type={self.task_type!r} is unknown: use one of {', '.join(get_args(TaskType))}")

    def base_name(self, base: Path | str) -> str:
        """``base_model`` if it is set; else ``base``, with a directory made absolute and a hub name kept."""
        if self.base_model is not None:
            return self.base_model
        return str(Path(base).resolve()) if Path(base).is_dir() else str(base)

    def revision_of(self, base: Path | str) -> str | None:
        """``revision``, if ``base`` is a name on the hub. A directory has none."""
        return None if Path(base).is_dir() else self.revision


def write_record(
    folder: Path,
    factors: Sequence[AdapterFactors],
    meta: ExportMeta,
    form: Form,
    base: str,
    dtype: str,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write ``salient_ds.json``: method, ranks per module (0 included), template, source run, versions, ``more``."""
    record = {
        "format": 1,
        "form": form,
        "method": meta.method,
        "task_type": meta.task_type,
        "base_model_name_or_path": base,
        **({"revision": meta.revision_of(base)} if meta.revision_of(base) else {}),
        "dtype": dtype,
        **rank_entries({item.name: item.rank for item in factors}),
        "template": dict(meta.template) if meta.template is not None else None,
        **({"task": dict(meta.task)} if meta.task is not None else {}),
        "source_run": meta.source_run,
        "versions": dict(meta.versions),
        **(more or {}),
    }
    write_json(folder / RECORD_FILE, record)


def rank_entries(ranks: Mapping[str, int]) -> dict[str, Any]:
    """How a record states the ranks of all modules, 0 included."""
    return {"total_rank": sum(ranks.values()), "ranks": dict(ranks)}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON in the given order, with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
