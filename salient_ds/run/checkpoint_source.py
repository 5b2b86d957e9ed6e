"""A run's trained adapter as what ``salient-ds shrink`` reads, one module at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.targets import is_shortcut
from salient_ds.engine.shard_files import MANIFEST, ShardReader
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.streamed import Entry
from salient_ds.heterolora.export import refuse_shortcuts
from salient_ds.host import file_sha256
from salient_ds.run.export import CheckpointFactors, checkpoint_facts, newest_checkpoint


class CheckpointSource:
    """The newest checkpoint of a run, or the given one (:class:`salient_ds.export.shrink.LoraSource`).

    Args:
        run: run directory, or one of its checkpoints.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ValueError: shortcuts act, which no LoRA format can hold, or modules were trained in full.
    """

    def __init__(self, run: Path) -> None:
        self.place = newest_checkpoint(run).resolve()
        config, meta, _ = checkpoint_facts(run, self.place)
        in_full = ShardReader(self.place, contents=False).manifest.get("in_full", ())
        if in_full:
            raise ValueError(
                f"{run} trained {len(in_full)} parameters in full ({in_full[0]['name']}, ...): export it first with "
                "salient-ds export, and shrink the adapter that this writes"
            )
        self._adapters = CheckpointFactors(self.place)
        shortcuts = [self._adapters.read(name) for name in self._adapters.names if is_shortcut(name)]
        norm = (config["adapter"].get("shortcuts") or {}).get("norm_after_shortcut")
        refuse_shortcuts(shortcuts, "ragged", norm)
        self.modules = [name for name in self._adapters.names if not is_shortcut(name)]
        self.embeddings: set[str] = set()
        self.config: dict[str, Any] = {
            "task_type": meta.task_type,
            "base_model_name_or_path": meta.base_name(config["model"]["path"]),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
        }
        self.carried: list[Entry] = []
        self.companions: Path | None = None
        self.record: dict[str, Any] = {"method": meta.method, "template": meta.template, "source_run": meta.source_run}

    def dtype(self, module: str) -> torch.dtype:
        """float32, as in an export."""
        return torch.float32

    def read(self, module: str) -> AdapterFactors:
        """The factors of one module, with its singular values and the mask of its live rows."""
        return self._adapters.read(module)

    def read_carried(self, key: str) -> Tensor:
        """A run has no other tensors."""
        raise KeyError(key)

    def sha256(self) -> dict[str, str]:
        """The sha256 of the checkpoint's manifest, which lists those of all its files."""
        return {MANIFEST: file_sha256(self.place / MANIFEST)}
